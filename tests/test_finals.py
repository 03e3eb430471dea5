"""Out-of-fold and public scores are believed as much as each deserves."""

import numpy as np
import pytest

from octofold.blend import finals
from octofold.metrics import METRICS
from test_blending import members

ACCURACY = METRICS["accuracy"]
NAN = float("nan")


def believe(public: list[float], tests: int, rows: int = 800, metric: str = "accuracy") -> finals.Belief:
    probs, target, _ = members((2.0, 1.9, 0.5), rows=rows)
    belief = finals.believe(
        list(probs), target, np.arange(rows), METRICS[metric], np.array(public), tests, 0.3
    )  # fmt: skip
    assert belief is not None
    return belief


def test_without_a_board_out_of_fold_decides() -> None:
    belief = believe([NAN, NAN, NAN], 1000)
    assert int(belief.mean.argmax()) == 0
    assert belief.mean[0] - belief.mean[2] == pytest.approx(belief.mean[0] - belief.mean[2])
    assert set(finals.best_two(belief)) == {0, 1}


def test_a_large_board_is_believed_and_a_small_one_is_not() -> None:
    """The board orders the two good ones the other way round, by ten points."""
    score = [
        ACCURACY.score(one, members((2.0, 1.9, 0.5), rows=800)[1]) for one in members((2.0, 1.9, 0.5), rows=800)[0]
    ]
    seen = [score[0] - 0.05, score[0] + 0.05, score[2]]
    small, large = believe(seen, 40), believe(seen, 20_000)
    gaps = [belief.mean[1] - belief.mean[0] for belief in (small, large)]
    assert gaps[0] < gaps[1]
    assert finals.best_two(large)[0] == 1
    assert gaps[1] > 0.07


def test_a_board_far_from_the_folds_is_believed_the_more() -> None:
    """Scores that disagree with out-of-fold by more than noise say that candidates drift."""
    near, far = believe([0.90, 0.89, 0.40], 3000), believe([0.60, 0.95, 0.80], 3000)
    assert far.drift > near.drift


def test_less_is_better_for_losses() -> None:
    belief = believe([NAN, NAN, NAN], 1000, metric="log_loss")
    assert int(belief.mean.argmin()) == 2


def test_resamples_without_a_class_do_not_make_the_worst_the_best() -> None:
    """AUC is not defined in them; one of these used to spoil the covariance, and the first two were picked."""
    rng = np.random.default_rng(0)
    target = (np.arange(60) < 3).astype(int)
    good = (0.1 + 0.8 * target + rng.normal(0, 0.02, 60)).clip(0, 1)
    candidates = [np.c_[1 - x, x] for x in (1 - good, 0.99 - 0.98 * good, good, 0.99 * good)]
    public = np.array([0.1, 0.11, 0.99, 0.98])
    belief = finals.believe(candidates, target, np.arange(60), METRICS["auc"], public, 60, 0.3)
    assert belief is not None
    assert set(finals.best_two(belief)) == {2, 3}
    assert finals.believe(candidates, 0 * target, np.arange(60), METRICS["auc"], public, 60, 0.3) is None


def test_a_hedge_errs_elsewhere() -> None:
    cov = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert finals.best_two(finals.Belief(np.array([1.0, 0.99, 0.9]), cov, 0.0)) == (0, 2)
    assert finals.best_two(finals.Belief(np.array([1.0]), np.eye(1), 0.0)) == (0, 0)


def test_where_one_is_far_ahead_the_next_best_goes_with_it() -> None:
    """No other adds anything to its expectation; the first of them used to be taken, which was the worst here."""
    assert finals.best_two(finals.Belief(np.array([-0.3, -1.05, -0.55]), 1e-4 * np.eye(3), 0.0)) == (0, 2)


def test_the_expected_maximum_is_clarks() -> None:
    """Against a simulation: the pair chosen is the one whose better draw is best."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        root = rng.normal(size=(4, 4))
        belief = finals.Belief(rng.normal(size=4), root @ root.T, 0.0)
        draws = np.random.default_rng(seed).multivariate_normal(belief.mean, belief.cov, 40_000)
        pairs = {(a, b): np.maximum(draws[:, a], draws[:, b]).mean() for a in range(4) for b in range(a)}
        chosen = finals.best_two(belief)
        assert pairs[max(chosen), min(chosen)] >= max(pairs.values()) - 0.03
