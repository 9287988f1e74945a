"""Rows as a table, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpisave.bench.turns import Row

# What tells one comparison from another; rows alike in these share a panel.
_PANEL = ("ranks", "writers", "mib", "arrays", "fsync")
# In the JSON only.
_HIDDEN = ("version",)


def table(rows: Sequence[Row]) -> str:
    """Return rows as lines with aligned columns."""
    names = [name for name in rows[0] if name not in _HIDDEN]
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each comparison, by its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = [
            f"{name} {row[name]}" if name == "fsync" else _amount(row[name], name)
            for name in _PANEL
            if name in row
        ]
        found.setdefault(", ".join(parts), []).append(row)
    return found


def _amount(number: int, name: str) -> str:
    return f"{number} {'MiB' if name == 'mib' else name}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw GB/s of every side as bars, a panel for each comparison.

    Parameters
    ----------
    rows : sequence of dict
        Rows with "side" and "gb_per_s".
    path : pathlib.Path
        The picture; its suffix says which kind.
    """
    from matplotlib.figure import Figure

    shown = panels(rows)
    heights = [len(of_panel) + 2 for of_panel in shown.values()]
    figure = Figure(figsize=(9, 0.25 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(shown), 1, height_ratios=heights, squeeze=False)
    for axis, (title, of_panel) in zip(axes[:, 0], shown.items(), strict=True):
        names = [row["side"] for row in of_panel]
        bars = axis.barh(
            names, [row["gb_per_s"] for row in of_panel], color=[*map(_color, names)]
        )
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
        axis.margins(x=0.1)
        axis.invert_yaxis()  # the first row on top, as in the table
        axis.set_title(title, fontsize="medium")
        axis.tick_params(labelsize="small")
    axes[-1, 0].set_xlabel("GB/s of the whole state, median")
    figure.savefig(path, dpi=150)


def _color(side: str) -> str:
    if side.startswith("bound"):
        return "0.7"
    return "tab:blue" if "mpisave" in side else "tab:orange"
