"""Axes: linear scales with round ticks, for charts that a template draws."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Axis(NamedTuple):
    """A linear scale with round ticks."""

    low: float
    high: float
    ticks: list[float]
    digits: int

    def at(self, value: float) -> float:
        """Return where a value lies, in percent of the axis, kept inside."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def holds(self, value: float) -> bool:
        """Tell whether a value lies on the axis."""
        return self.low - 1e-9 <= value <= self.high + 1e-9

    def label(self, value: float) -> str:
        """Return a tick's text, no longer than its neighbours need."""
        return f"{value:.{self.digits}f}"


def fit(values: Sequence[float], ticks: int = 5, include: Sequence[float] = ()) -> Axis:
    """Make a scale that holds all finite values, with ticks at 1, 2 or 5 times a power of ten."""
    finite = [float(value) for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9:
        low, high = low - 0.5 * max(abs(low), 1e-3) * 0.1, high + 0.5 * max(abs(high), 1e-3) * 0.1
    rough = (high - low) / max(1, ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [round(step * place, 12) for place in range(first, last + 1)]
    return Axis(marks[0], marks[-1], marks, max(0, -math.floor(math.log10(step) + 1e-9)))


def robust(values: Sequence[float], higher_is_better: bool) -> Axis:
    """An axis that follows the better half and leaves outliers at its edge."""
    sign = 1 if higher_is_better else -1
    ordered = sorted((value for value in values if math.isfinite(value)), key=lambda value: -sign * value)
    reach = 4 * max(abs(ordered[0] - ordered[len(ordered) // 2]), 1e-3)
    return fit([value for value in ordered if abs(value - ordered[0]) <= reach])
