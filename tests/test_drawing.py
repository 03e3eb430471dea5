"""Labels drawn from probabilities, and the scores that follow from them."""

import numpy as np
import pytest

from octofold.blend import blending, drawing, estimate, shift
from octofold.metrics import METRICS
from test_blending import members
from test_shift import world


def test_calibrated_probabilities_have_the_accuracy_asked_for() -> None:
    test, _ = world(500, 0.3, 0)
    for wanted in (0.6, 0.9):
        assert drawing.calibrated(test, wanted).max(axis=1).mean() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("method", ["rank", "hard_vote", "equal"])
@pytest.mark.parametrize("classes", [5, 200])
def test_ranks_and_votes_are_calibrated_too(method: str, classes: int) -> None:
    probs, target, fold = members((3.0, 3.2, 2.8), rows=800, classes=classes)
    said = blending.fit(method, probs, target, fold).apply(probs)
    for wanted in (0.6, 0.85):
        assert drawing.calibrated(said, wanted).max(axis=1).mean() == pytest.approx(wanted, abs=1e-3)


def test_what_cannot_be_as_sure_as_asked_is_as_sure_as_it_gets() -> None:
    level = np.full((30, 4), 0.25)
    assert drawing.calibrated(level, 0.9) == pytest.approx(level)
    sure = np.eye(4)[np.zeros(30, int)]
    assert drawing.calibrated(sure, 1.0) == pytest.approx(sure)


def test_other_scores_follow_from_the_estimate_of_accuracy() -> None:
    test, _ = world(800, 0.3, 0)
    oof, target = world(900, 0.3, 1)
    outlook = shift.Outlook(shift.Interval(0.8, 0.75, 0.84), 0.85, {})
    same = drawing.derived(test, outlook, METRICS["accuracy"], oof, target)
    assert same.value == pytest.approx(0.8, abs=0.01)
    assert same.low == pytest.approx(0.75, abs=0.025)
    assert same.high == pytest.approx(0.84, abs=0.025)
    for name in ("macro_f1", "log_loss", "quadratic_kappa"):
        found = drawing.derived(test, outlook, METRICS[name], oof, target)
        assert found.low < found.value < found.high
    worse = shift.Outlook(shift.Interval(0.6, 0.55, 0.65), 0.85, {})
    loss = METRICS["log_loss"]
    assert (
        drawing.derived(test, worse, loss, oof, target).value > drawing.derived(test, outlook, loss, oof, target).value
    )


@pytest.mark.parametrize(
    ("method", "classes", "name"),
    [("rank", 50, "macro_f1"), ("rank", 50, "log_loss"), ("hard_vote", 10, "log_loss"), ("equal", 50, "macro_f1")],
)
def test_a_rule_whose_values_are_no_probabilities_is_foretold_too(method: str, classes: int, name: str) -> None:
    """Test images of the same kind: the estimate is near the truth, which lies in its interval."""
    metric = METRICS[name]
    probs, truth, fold = members((1.9, 2.1, 2.0) if classes == 10 else (3.0, 3.2, 2.8), rows=2400, classes=classes)
    train, test = np.arange(2400) < 1400, np.arange(2400) >= 1400
    oof = estimate.cross_fit(method, probs[:, train], truth[train], fold[train], METRICS["accuracy"]).values
    said = blending.fit(method, probs[:, train], truth[train], fold[train]).apply(probs[:, test])
    right = METRICS["accuracy"].score(oof, truth[train])
    outlook = shift.Outlook(shift.Interval(right, right - 0.025, right + 0.02), right, {})
    found = drawing.derived(said, outlook, metric, oof, truth[train])
    wanted = metric.score(said, truth[test])
    assert found.low <= wanted <= found.high
    assert found.value == pytest.approx(wanted, abs=0.03 if metric.higher_is_better else 0.15 * wanted)
