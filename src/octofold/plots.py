"""Pictures: arrays in, matplotlib figures out. No global state, no window: every figure is drawn by Agg.

Series differ in line style and marker as well as in colour, so that a black-and-white print reads the same.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Figure  # for the signatures of others
from matplotlib.text import Text

from octofold.files import atomic

Array = npt.NDArray[Any]
STYLES = (("#0b5fa5", "-", "o"), ("#c4500a", "--", "s"), ("#2e7d32", "-.", "^"), ("#6a3d9a", ":", "D"))


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Return an empty figure of this size in inches, drawn by Agg and known to no one else."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure (format by the suffix), whole or not at all; return the path."""
    literal(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    return Path(path)


def literal(figure: Figure) -> None:
    """Make every text say what it says: a class may be called `$5_$ note`, which matplotlib would read as a formula.

    The powers of ten that matplotlib itself writes on logarithmic axes stay formulas.
    """
    own = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
        if axis.get_scale() != "linear"
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in own:
            text.set_parse_math(False)


def _listed(name: str) -> str:
    """A name that a legend lists: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def curves(history: Any, x: str = "epoch", marks: Sequence[float] = (), title: str = "") -> Figure:
    """Draw training curves: one panel per metric, the splits of a metric (``train/loss``, ``valid/loss``) together.

    Args:
        history: a DataFrame, or a mapping of columns of equal length; non-numeric ones are left out, NaN are gaps.
        x: the column on the horizontal axis; the row number where there is no such column.
        marks: x positions of vertical lines, such as the first epoch of each phase.
        title: above it all.
    """
    columns = {str(name): np.asarray(history[name]) for name in history if str(name) != x}
    numeric = {name: values.astype(float) for name, values in columns.items() if values.dtype.kind in "fiub"}
    steps = np.asarray(history[x], dtype=float) if x in history else np.arange(len(next(iter(numeric.values()), [])))
    panels: dict[str, list[str]] = {}
    for name in numeric:
        panels.setdefault(name.rpartition("/")[2], []).append(name)
    count = max(1, len(panels))
    wide = min(3, count)
    figure = new_figure(4.2 * wide, 3.2 * -(-count // wide))
    for place, (metric, names) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-count // wide), wide, place + 1, xlabel=x, title=metric)
        for name, (colour, line, marker) in zip(names, cycle(STYLES), strict=False):
            axes.plot(steps, numeric[name], line, color=colour, marker=marker, markersize=3, label=name)
        for mark in marks:
            axes.axvline(mark, color="0.6", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    return figure


def confusion(table: Array, classes: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix, rows truth and columns prediction, shaded by the share of the row.

    Args:
        table: ``(K, K)`` int counts, as `metrics.confusion` makes them.
        classes: K names, in column order.
        title: above it.
    """
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    side = min(24.0, max(4.5, 2.2 + 0.38 * len(classes)))
    figure = new_figure(side, side * 0.92)
    axes = figure.add_subplot(xlabel="predicted", ylabel="truth", title=title)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize="small")
    axes.set_yticks(range(len(classes)), classes, fontsize="small")
    if len(classes) <= 40:  # beyond, numbers are unreadable and slow to draw
        for row, column in zip(*np.nonzero(table), strict=True):
            ink = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=ink, fontsize="small")
    figure.colorbar(picture, ax=axes, fraction=0.045, label="share of the row")
    return figure


def bar(
    names: Sequence[str], values: Sequence[float] | Array, title: str = "", label: str = "", errors: Any = None
) -> Figure:
    """Draw one horizontal bar per name, first at the top, with its value written at the end.

    Args:
        names: of the bars.
        values: ``(N,)`` lengths.
        title: above it.
        label: of the value axis.
        errors: ``(N,)`` half widths or ``(2, N)`` distances below and above, or None.
    """
    figure = new_figure(7.0, 1.2 + 0.32 * max(1, len(names)))
    axes = figure.add_subplot(xlabel=label, title=title)
    places = np.arange(len(names))
    axes.barh(places, values, color=STYLES[0][0], xerr=errors, ecolor="0.2", capsize=3)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.4g}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    return figure


def grid(
    images: Sequence[Array], captions: Sequence[str] = (), title: str = "", columns: int = 6, points: Any = None
) -> Figure:
    """Draw small pictures in rows, each with a caption under it.

    Args:
        images: ``(H, W, 3)`` or ``(H, W)`` uint8 arrays, of any sizes.
        captions: one per image, or none.
        title: above it all.
        columns: pictures in a row.
        points: per image, a mapping from a marker name to ``(P, 2)`` x, y pixels in that image, or None.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure = new_figure(1.9 * columns, 2.15 * rows + 0.3 * bool(title))
    for place, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(captions[place] if captions else "", fontsize="x-small")
        named = points[place] if points is not None else {}
        for (name, where), (colour, _, _), marker in zip(named.items(), cycle(STYLES[1::-1]), "+x", strict=False):
            axes.plot(where[:, 0], where[:, 1], marker, color=colour, markersize=5, label=name)
        if named and place == 0:
            axes.legend(fontsize="xx-small", loc="upper left")
    figure.suptitle(title)
    return figure


def reliability(table: Any, title: str = "", error: float | None = None) -> Figure:
    """Draw how often the model is right against how sure it is; the area of a dot is its share of the rows.

    Args:
        table: a DataFrame or mapping with ``rows``, ``confidence``, ``accuracy``; empty bins NaN.
        title: above it.
        error: expected calibration error, written in the corner.
    """
    rows, sure, right = (np.asarray(table[name], dtype=float) for name in ("rows", "confidence", "accuracy"))
    figure = new_figure(4.6, 4.4)
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated")
    axes.plot(sure, right, color=STYLES[0][0], linewidth=1)
    axes.scatter(sure, right, s=12 + 300 * rows / max(rows.sum(), 1), color=STYLES[0][0], alpha=0.7, label="bins")
    if error is not None:
        axes.text(0.97, 0.05, f"ECE {error:.3f}", ha="right", transform=axes.transAxes)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small", markerscale=0.5)
    return figure


def stacked(table: Array, names: Sequence[str], parts: Sequence[str], title: str = "", label: str = "") -> Figure:
    """Draw one horizontal bar per name, made of parts: samples per class and fold.

    Args:
        table: ``(names, parts)`` numbers >= 0.
        names: of the bars, first at the top.
        parts: of each bar, for the legend.
        title: above it.
        label: of the value axis.
    """
    figure = new_figure(7.5, min(60.0, 1.4 + 0.3 * max(1, len(names))))
    axes = figure.add_subplot(xlabel=label, title=title)
    places, left = np.arange(len(names)), np.zeros(len(names))
    for column, part in enumerate(parts):
        shade = str(0.25 + 0.6 * column / max(1, len(parts) - 1))
        axes.barh(
            places, table[:, column], left=left, color=shade, edgecolor="white", linewidth=0.5, label=_listed(part)
        )
        left = left + table[:, column]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.legend(fontsize="x-small", ncols=min(10, max(1, len(parts))), loc="lower right")
    return figure


def histograms(columns: Mapping[str, Any], title: str = "", bins: int = 40) -> Figure:
    """Draw one histogram per column; a column may be ``{"train": values, "test": values}``, drawn over each other."""
    wide = min(3, max(1, len(columns)))
    figure = new_figure(3.8 * wide, 2.9 * -(-len(columns) // wide))
    for place, (name, given) in enumerate(columns.items()):
        axes = figure.add_subplot(-(-len(columns) // wide), wide, place + 1, title=name)
        series = given if isinstance(given, Mapping) else {"": given}
        finite = {
            part: np.asarray(values, float)[np.isfinite(np.asarray(values, float))] for part, values in series.items()
        }
        everything = np.concatenate([*finite.values(), np.zeros(0)])
        edges = np.histogram_bin_edges(everything, bins) if len(everything) else np.linspace(0, 1, 2)
        for (part, values), (colour, line, _) in zip(finite.items(), cycle(STYLES), strict=False):
            weights = np.full(len(values), 1 / max(1, len(values)))
            axes.hist(
                values, edges.tolist(), weights=weights, histtype="step", color=colour, linestyle=line, label=part
            )
        axes.set_ylabel("share")
        if len(series) > 1:
            axes.legend(fontsize="x-small")
    figure.suptitle(title)
    return figure


def forget(figure: Figure) -> None:
    """Take a figure that a library drew through pyplot out of pyplot's list, which would keep it for ever."""
    from matplotlib import pyplot

    pyplot.close(figure)


def intervals(
    names: Sequence[str], ends: Sequence[tuple[float, float, float]], title: str = "", label: str = ""
) -> Figure:
    """Draw one dot with whiskers per name, first at the top, and a line at zero.

    Args:
        names: of the rows.
        ends: low, value and high of each.
        title: above it.
        label: of the value axis.
    """
    figure = new_figure(7.0, 1.4 + 0.34 * max(1, len(names)))
    axes = figure.add_subplot(xlabel=label, title=title)
    places = np.arange(len(names))
    low, value, high = np.asarray(ends, float).reshape(-1, 3).T
    axes.axvline(0, color="0.6", linewidth=1)
    axes.errorbar(value, places, xerr=[value - low, high - value], fmt="o", color=STYLES[0][0], capsize=4)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.1)
    return figure


def strips(rows: Mapping[str, Sequence[Array]], title: str = "") -> Figure:
    """Draw one strip of pictures per name, side by side: a few samples of each class, cheaply.

    Args:
        rows: name to ``(S, S, 3)`` uint8 squares, all of one size.
        title: above it all.
    """
    longest = max((len(images) for images in rows.values()), default=1)
    figure = new_figure(1.1 * longest + 1.6, 1.15 * max(1, len(rows)) + 0.4)
    for place, (name, images) in enumerate(rows.items()):
        axes = figure.add_subplot(max(1, len(rows)), 1, place + 1)
        side = images[0].shape[0]
        strip = np.full((side, longest * (side + 2), 3), 255, np.uint8)
        for column, image in enumerate(images):
            strip[:, column * (side + 2) : column * (side + 2) + side] = image
        axes.imshow(strip)
        axes.set_axis_off()
        axes.text(-0.01, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize="small")
    figure.suptitle(title)
    return figure


def scatter_line(x: Array, y: Array, target: float, chosen: int, labels: tuple[str, str], title: str = "") -> Figure:
    """Draw a curve over settings, with the value aimed at and the setting chosen marked."""
    figure = new_figure(6.0, 3.6)
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1], title=title)
    colour, line, marker = STYLES[0]
    axes.plot(x, y, line, color=colour, marker=marker, label="held-out images")
    axes.axhline(target, color=STYLES[1][0], linestyle=STYLES[1][1], label="test images")
    axes.plot(
        x[chosen], y[chosen], marker="D", markersize=10, fillstyle="none", color="k", linestyle="", label="chosen"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def explanation(
    image: Array, caption: str, views: Array, classes: Sequence[str], nearest: Sequence[tuple[Array, str]]
) -> Figure:
    """Draw one row of a submission: the image, each view's vote, and the training images most like it.

    Args:
        image: ``(H, W, 3)`` uint8.
        caption: under it.
        views: ``(V, C)`` probability of C classes in each view; may be empty.
        classes: C names.
        nearest: training images with their captions.
    """
    figure = new_figure(9.0, 5.2)
    figure.set_layout_engine("tight")
    columns = max(3, len(nearest))
    top = figure.add_subplot(2, 2, 1)
    top.imshow(image)
    top.set_xlabel(caption)
    bars = figure.add_subplot(2, 2, 2, ylim=(0, 1), xlabel="view", title="each view alone")
    hatches, width = ("", "//", "..", "xx"), 0.8 / max(1, len(classes))
    for place, name in enumerate(classes if len(views) else ()):
        where = np.arange(1, len(views) + 1) + (place - (len(classes) - 1) / 2) * width
        bars.bar(where, views[:, place], width, label=_listed(name), color=STYLES[place % len(STYLES)][0],
                 hatch=hatches[place % 4], edgecolor="white")  # fmt: skip
    if len(views):
        bars.legend(fontsize="x-small")
    for place, (picture, text) in enumerate(nearest):
        axes = figure.add_subplot(2, columns, columns + place + 1)
        axes.imshow(picture)
        axes.set_xlabel(text, fontsize="small")
    for axes in figure.axes:
        if axes is not bars:
            axes.set_xticks([])
            axes.set_yticks([])
    return figure
