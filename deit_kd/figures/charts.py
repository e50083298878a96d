"""The figures of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from deit_kd.figures.series import Chart, colour_of
from deit_kd.figures.style import FAINT, INK, WIDTH, styled
from deit_kd.interfaces import printable

SHADE = "#1f6fb5"  # of a matrix
LEVEL = (0, (4, 2))  # dash of a horizontal line
ENDS = ":"  # of a vertical one
MOST_WITHIN = 4  # entries of a legend inside a chart


def line_charts(charts: Sequence[Chart], columns: int = 1) -> Figure:
    """Draw charts side by side; a legend that would cover the lines stands below them."""
    with styled():
        rows = [charts[first : first + columns] for first in range(0, len(charts), columns)]
        below = [max(_rows_below(chart) for chart in row) for row in rows]
        heights = [2.9 + 0.2 * lines for lines in below]
        figure = Figure(figsize=(WIDTH * columns, sum(heights)), layout="constrained")
        axes = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
        for chart, axis in zip(charts, axes, strict=False):
            _draw_lines(axis, chart)
        for axis in axes[len(charts) :]:
            axis.set_axis_off()
        return figure


def _draw_lines(axis: Axes, chart: Chart) -> None:
    for line in chart.series:
        lonely = "o" if np.isfinite(line.y).sum() == 1 else None
        axis.plot(line.x, line.y, color=line.colour, linestyle=line.dash, marker=lonely)
        axis.update_datalim([(x, 0) for x in line.x], updatey=False)  # also where it has no value
    for _, level in chart.levels:
        axis.axhline(level, color=FAINT, linestyle=LEVEL)
    for mark in chart.marks:
        axis.axvline(mark.x, color=mark.colour, linestyle=ENDS)
    axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    keys = _keys(chart)
    if len(keys) > 1:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.2), "ncols": 2}
        axis.legend(handles=[Line2D([], [], **key) for key in keys], **(place if _rows_below(chart) else {}))


def _keys(chart: Chart) -> list[dict[str, Any]]:
    """Return name, colour and dash of each entry of a chart's legend."""
    marks = [] if chart.keys else [(mark.name, mark.colour, ENDS) for mark in chart.marks]
    entries: list[tuple[str, str, Any]] = [
        *((key.name, key.colour, key.dash) for key in chart.keys or chart.series),
        *((name, FAINT, LEVEL) for name, _ in chart.levels),
        *marks,
    ]
    return [{"label": _short(name), "color": colour, "linestyle": dash} for name, colour, dash in entries]


def _rows_below(chart: Chart) -> int:
    """Return how many rows a legend below the chart has; 0 if it stands within."""
    entries = len(_keys(chart))
    return -(-entries // 2) if chart.keys or entries > MOST_WITHIN else 0


def _short(name: str, most: int = 40) -> str:
    """Return a name for a legend or an axis; a long one, such as that of a run's peer, without its middle."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def reliability_diagram(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw accuracy over confidence, one line per head, and below it the number of images in each bin.

    The line omits bins with less than a hundredth of the images: accuracy means little there.

    Args:
        bins: the rows of `deit_kd.metrics.reliability`, by head.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=FAINT, linestyle=":", label="calibrated")
        total = len(bins)
        for position, (name, rows) in enumerate(bins.items()):
            images = sum(row["n"] for row in rows)
            filled = [row for row in rows if row["n"] and row["n"] >= images / 100]
            colour = colour_of(name, position)
            x, y = [row["confidence"] for row in filled], [row["accuracy"] for row in filled]
            above.plot(x, y, color=colour, marker="o", markersize=3.5, label=name)
            width = (rows[0]["to"] - rows[0]["from"]) * 0.86 / total
            left = [row["from"] + (row["to"] - row["from"]) * 0.07 + width * position for row in rows]
            below.bar(left, [row["n"] for row in rows], width=width, align="edge", color=colour)
        above.set(title="Is it as sure as it is right?", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        below.set(xlabel="confidence", ylabel="images")
        below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        above.legend()
        return figure


def matrix(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], digits: int = 3
) -> Figure:
    """Draw a table of non-negative values, darker where larger, with numbers if they fit."""
    with styled():
        data = np.asarray(values, dtype=float)
        figure = Figure(figsize=(WIDTH, 1.2 + 0.38 * len(rows)), layout="constrained")
        axis = figure.subplots()
        largest = max(float(data.max()), 1e-9)
        shade = data / largest
        # Opaque where large, the page's background where 0: legible on white and on black.
        cells = np.concatenate([np.broadcast_to(to_rgb(SHADE), (*data.shape, 3)), shade[..., None]], axis=-1)
        axis.pcolormesh(cells)
        if len(columns) <= 8:
            for (row, column), value in np.ndenumerate(data):
                ink = "white" if shade[row, column] > 0.55 else INK
                text = f"{value:.{digits}f}"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize="small", color=ink)
        slanted = len(columns) > 4 or max(map(len, columns)) > 9
        above, beside = ([_short(name, 16) for name in names] for names in (columns, rows))
        axis.set_xticks(np.arange(len(columns)) + 0.5, above, rotation=30 if slanted else 0)
        axis.set_yticks(np.arange(len(rows)) + 0.5, beside)
        axis.tick_params(length=0)
        axis.invert_yaxis()
        axis.grid(False)
        axis.spines[:].set_visible(False)
        # Over the names of the rows as well: beside long ones it would be cut off.
        figure.suptitle(title, x=0.02, ha="left", fontsize="medium", fontweight="bold")
        return figure


def token_chart(by_student: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the cosine of the two tokens by depth, mean and spread over images, one line per student."""
    with styled():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axis = figure.subplots()
        for position, (name, layers) in enumerate(by_student.items()):
            mean = np.array([layer["mean"] for layer in layers])
            spread = np.array([layer["spread"] for layer in layers])
            depth, colour = np.arange(len(layers)), colour_of("", position)
            axis.plot(depth, mean, color=colour, marker="o", markersize=3.5, label=_short(name))
            axis.fill_between(depth, mean - spread, mean + spread, color=colour, alpha=0.25, linewidth=0)
        axis.set(title="How alike are the two tokens?", xlabel="block (0 is the input)", ylabel="cosine")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        if len(by_student) > 1:
            axis.legend()
        return figure


def class_bars(title: str, classes: Sequence[str], heads: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw each head's accuracy in percent by class, in the order given."""
    with styled():
        thickness = 0.8 / len(heads)
        figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(classes)), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(classes))
        for position, (name, values) in enumerate(heads.items()):
            lengths = [0.0 if value is None else value for value in values]
            offset = (position - (len(heads) - 1) / 2) * thickness
            axis.barh(places + offset, lengths, height=thickness, color=colour_of(name, position), label=name)
        axis.set_yticks(places, [name if len(name) <= 22 else name[:21] + "…" for name in map(printable, classes)])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set(title=title, xlabel="top-1 %", xlim=(0, 100))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(heads))
        return figure
