"""Estimates do not see what they score, and their intervals hold what they promise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from octofold.blend import estimate, verdict
from octofold.errors import UserError
from octofold.metrics import METRICS, Metric
from test_blending import members

ACCURACY = METRICS["accuracy"]
SLOW_AUC = pytest.param("auc", marks=pytest.mark.slow)


def test_cross_fit_blends_each_fold_without_it() -> None:
    probs, target, fold = members()
    whole = estimate.cross_fit("lr_mse", probs, target, fold, ACCURACY)
    wrong = np.where(fold == 2, (target + 1) % 5, target)
    other = estimate.cross_fit("lr_mse", probs, wrong, fold, ACCURACY)
    np.testing.assert_array_equal(whole.values[fold == 2], other.values[fold == 2])
    assert not np.array_equal(whole.values[fold != 2], other.values[fold != 2])
    assert len(whole.blends) == 5


def test_a_member_that_memorised_its_labels_is_not_trusted_by_the_cross_fitted_score() -> None:
    """Class-wise tables fitted on noise look good in-sample only."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(6), size=(12, 120)).astype(np.float32)
    target, fold = rng.integers(0, 6, 120), np.arange(120) % 4
    from octofold.blend import blending

    apparent = ACCURACY.score(blending.fit("stack", probs, target, fold).apply(probs), target)
    honest = ACCURACY.score(estimate.cross_fit("stack", probs, target, fold, ACCURACY).values, target)
    assert honest < apparent
    assert honest < 0.27  # chance is 1/6


def test_best_single_is_chosen_on_the_other_folds() -> None:
    probs, target, fold = members((1.0, 1.0))
    probs = probs.copy()
    probs[0, fold == 0] = np.eye(5)[(target[fold == 0] + 1) % 5]  # member 0 fails on fold 0 alone
    probs[1, fold != 0] = 0.2
    chosen = estimate.best_single(probs, target, fold, ACCURACY)
    np.testing.assert_array_equal(chosen[fold == 0], probs[0, fold == 0])


def test_one_fold_is_refused() -> None:
    probs, target, _ = members()
    with pytest.raises(UserError, match="at least two folds"):
        estimate.cross_fit("equal", probs, target, np.zeros(len(target), int), ACCURACY)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.task == "classify"])
def test_bootstrap_is_paired_and_centred(name: str) -> None:
    probs, target, _ = members()
    draws = estimate.bootstrap([probs[2], probs[2], probs[1]], target, np.arange(len(target)), METRICS[name], reps=100)
    np.testing.assert_array_equal(draws[0], draws[1])
    assert abs(draws[0].mean() - METRICS[name].score(probs[2], target)) < 4 * draws[0].std()


def test_groups_come_and_go_together() -> None:
    """Twenty copies of each row are no more evidence than one."""
    probs, target, _ = members(rows=60)
    repeated, truth = np.repeat(probs[1], 20, axis=0), np.repeat(target, 20)
    groups = np.repeat(np.arange(60), 20)
    alone = estimate.bootstrap([repeated], truth, np.arange(1200), ACCURACY)[0].std()
    together = estimate.bootstrap([repeated], truth, groups, ACCURACY)[0].std()
    assert together == pytest.approx(alone * np.sqrt(20), rel=0.15)


def test_interval_covers() -> None:
    """Of 200 samples, the 95 % interval misses the true share about one time in twenty."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        right = rng.random(150) < 0.8
        values = np.eye(2)[right.astype(int)]
        draws = estimate.bootstrap([values], np.ones(150, int), np.arange(150), ACCURACY, reps=200, seed=seed)
        found = estimate.interval(right.mean(), draws[0])
        hits += found.low <= 0.8 <= found.high
    assert 180 <= hits <= 198


def test_resamples_without_a_class_are_left_out_of_intervals() -> None:
    """A binary AUC of a few groups is not defined on every resample."""
    rng = np.random.default_rng(0)
    target = np.repeat(np.arange(30) < 3, 4).astype(int)
    groups = np.repeat(np.arange(30), 4)
    one, other = (rng.dirichlet(np.ones(2), 120) for _ in range(2))
    draws = estimate.bootstrap([one, other], target, groups, METRICS["auc"], reps=400)
    assert 0 < np.isnan(draws).mean() < 0.2
    found = estimate.interval(0.5, draws[0])
    assert found.low < 0.5 < found.high
    assert estimate.gain("twin", draws[0], draws[0], (0.5, 0.5), METRICS["auc"]).probability == 0.5


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_one_group_says_nothing_of_how_sure_a_score_is(name: str) -> None:
    probs, target, fold = members((0.3, 3.0))
    group, metric = np.zeros(len(target), int), METRICS[name]
    draws = estimate.bootstrap(list(probs), target, group, metric)
    found = estimate.gain("worse", draws[1], draws[0], (0.9, 0.3), metric)
    assert not found.separable
    assert np.isnan([found.low, found.high, found.probability]).all()
    judged = verdict.judge("equal", probs, ["a", "b"], target, fold, group, metric)
    assert np.isnan([judged.score.low, judged.score.high, judged.standard_error]).all()
    assert not any(gain.separable for gain in judged.gains)


@pytest.mark.parametrize("name", ["accuracy", "log_loss", "brier", "quadratic_kappa"])
def test_no_interval_holds_a_score_that_cannot_be(name: str) -> None:
    """Two seeds as unlike as can be: the interval ends where the metric does, the standard error does not."""
    probs, target, fold = members((3.0,))
    metric, per_seed = METRICS[name], [probs, np.roll(probs, 1, axis=2)]
    judged = verdict.judge("equal", probs, ["a"], target, fold, np.arange(len(target)), metric, per_seed)
    assert metric.least <= judged.score.low < judged.score.value < judged.score.high <= metric.most
    assert metric.least in judged.score or metric.most in judged.score
    assert judged.standard_error == pytest.approx(judged.seed_spread / np.sqrt(2), rel=0.02)


def test_another_metrics_standard_error_is_that_of_a_verdict_by_it() -> None:
    """Training seeds count there too."""
    probs, target, fold = members((2.0,))
    per_seed, groups = [probs, np.roll(probs, 1, axis=2)], np.arange(len(target)) // 3
    by_loss, by_hits = (
        verdict.judge("equal", probs, ["a"], target, fold, groups, METRICS[name], per_seed)
        for name in ("log_loss", "accuracy")
    )
    rows: Any = SimpleNamespace(target=target, groups=groups)
    found = verdict.standard_error(by_loss, rows, per_seed, ACCURACY)
    assert found == pytest.approx(by_hits.standard_error, rel=1e-6)
    assert found > 3 * verdict.standard_error(by_loss, rows, [], ACCURACY)


def test_a_score_of_the_users_own_has_no_bounds() -> None:
    own = Metric(lambda values, target: 0.0, True, "classify")
    assert estimate.Interval(0.9, -3.0, 7.0).within(own) == (0.9, -3.0, 7.0)
    assert estimate.Interval(0.9, -3.0, 7.0).within(ACCURACY) == (0.9, 0.0, 1.0)
    assert np.isnan(estimate.Interval(0.9, np.nan, np.nan).within(ACCURACY)[1:]).all()


def test_gain_of_equals_is_a_coin() -> None:
    probs, target, _ = members()
    draws = estimate.bootstrap([probs[0], probs[0], probs[2]], target, np.arange(len(target)), ACCURACY)
    same = estimate.gain("twin", draws[0], draws[1], (0.5, 0.5), ACCURACY)
    assert same.probability == 0.5
    assert not same.separable
    assert "not separable" in str(same)
    real = estimate.gain("worse", draws[2], draws[0], (0.8, 0.5), ACCURACY)
    assert real.separable
    assert real.low > 0


def test_what_was_chosen_without_a_fold_is_what_that_fold_is_scored_in() -> None:
    """Views that only fold 2 would choose do not reach its score."""
    probs, target, fold = members()
    other = probs[:, :, ::-1].copy()
    plain = estimate.cross_fit("lr_mse", probs, target, fold, ACCURACY)
    mixed = estimate.cross_fit("lr_mse", probs, target, fold, ACCURACY, {2: other})
    whole = estimate.cross_fit("lr_mse", other, target, fold, ACCURACY)
    np.testing.assert_array_equal(mixed.values[fold != 2], plain.values[fold != 2])
    np.testing.assert_array_equal(mixed.values[fold == 2], whole.values[fold == 2])


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1", "log_loss", SLOW_AUC, "quadratic_kappa"])
def test_a_verdict_in_any_metric(name: str) -> None:
    probs, target, fold = members()
    metric = METRICS[name]
    judged = verdict.judge("auto", probs, ["a", "b", "c", "d"], target, fold, np.arange(len(target)), metric)
    assert judged.score.low < judged.score.value < judged.score.high
    assert judged.gains[0].value == pytest.approx(
        metric.sign * (judged.score.value - metric.score(estimate.best_single(probs, target, fold, metric), target))
    )
    assert any(line.startswith(f"{name} of auto") for line in verdict.told(judged, name))
