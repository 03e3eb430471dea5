"""Pictures: every figure function draws what it is given, keeps no global state, writes whole files."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from octofold import plots

RNG = np.random.default_rng(0)
FIGURES: dict[str, Callable[[], Figure]] = {
    "curves": lambda: plots.curves(
        {"epoch": [0, 1, 2], "train/loss": [3.0, 2.0, np.nan], "valid/loss": [3, 2, 1], "phase": ["a", "a", "b"]},
        marks=[1.5],
    ),
    "curves, nothing yet": lambda: plots.curves({"epoch": []}),
    "confusion": lambda: plots.confusion(RNG.integers(0, 9, (4, 4)), list("abcd"), "title"),
    "confusion, 100 classes": lambda: plots.confusion(RNG.integers(0, 9, (100, 100)), [str(i) for i in range(100)]),
    "confusion, empty rows": lambda: plots.confusion(np.zeros((3, 3), int), list("abc")),
    "bar": lambda: plots.bar(["one", "two"], [0.25, 0.75], errors=[0.1, 0.1]),
    "grid": lambda: plots.grid([np.zeros((8, 9, 3), np.uint8), np.zeros((5, 4), np.uint8)], ["a", "b"]),
    "grid, points": lambda: plots.grid(
        [np.zeros((8, 9, 3), np.uint8)],
        ["a"],
        points=[{"truth": np.ones((2, 2)), "predicted": np.full((2, 2), np.nan)}],
    ),
    "grid, nothing": lambda: plots.grid([]),
    "reliability": lambda: plots.reliability(
        {"rows": [0, 3], "confidence": [np.nan, 0.7], "accuracy": [np.nan, 1.0]}, "title", 0.3
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_written(name: str, tmp_path: Path) -> None:
    path = plots.save(FIGURES[name](), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_no_global_state() -> None:
    for make in FIGURES.values():
        make()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_curves_put_the_splits_of_a_metric_together() -> None:
    panels = FIGURES["curves"]().axes
    assert [axes.get_title() for axes in panels] == ["loss"]  # text columns are left out
    assert [line.get_label() for line in panels[0].lines][:2] == ["train/loss", "valid/loss"]
    assert len({line.get_linestyle() for line in panels[0].lines[:2]}) == 2  # told apart without colour


def test_names_are_no_formulas_and_none_is_left_out_of_a_legend(tmp_path: Path) -> None:
    names = ["$5_$ note", "a $^$ b", "_background"]
    square = np.zeros((8, 8, 3), np.uint8)
    told = plots.explanation(square, names[0], np.full((8, 3), 0.3), names, 4 * [(square, names[1])])
    for place, figure in enumerate((plots.confusion(np.eye(3, dtype=int), names), told)):
        plots.save(figure, tmp_path / f"{place}.png")
    for figure in (told, plots.stacked(np.ones((2, 3)), ["a", "b"], names)):
        legend = next(found for axes in figure.axes if (found := axes.get_legend()))
        assert [text.get_text().strip() for text in legend.get_texts()] == names


def test_powers_of_ten_stay_formulas() -> None:
    figure = plots.scatter_line(np.array([1e-4, 1e-1]), np.array([0.1, 0.2]), 0.1, 0, ("a_$ rate", "score"))
    figure.axes[0].set_xscale("log")
    plots.literal(figure)
    assert all(label.get_parse_math() for label in figure.axes[0].get_xticklabels())
    assert not figure.axes[0].xaxis.label.get_parse_math()
