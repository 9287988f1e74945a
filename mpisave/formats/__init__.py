"""Formats: a layout function and an index reader each."""
