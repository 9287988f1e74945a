"""Measurements: ``python -m mpisave.bench save``. See docs/performance.md."""
