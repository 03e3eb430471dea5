"""Boards played many times."""

from typing import Any

import numpy as np
import pytest

from octofold.blend import shakeup
from octofold.metrics import METRICS
from test_blending import members


def draw(*given: Any, **more: Any) -> shakeup.Worlds:
    played = shakeup.draw(*given, **more)
    assert played is not None
    return played


def worlds(public_share: float = 0.3, metric: str = "accuracy", reps: int = 300) -> shakeup.Worlds:
    probs, target, _ = members((2.0, 1.9, 0.5), rows=800)
    return draw(
        list(probs), ["good", "near", "bad"], np.eye(5)[target], METRICS[metric], public_share, resample=True, reps=reps
    )


def test_a_smaller_public_part_is_noisier() -> None:
    assert worlds(0.1).public[0].std() > worlds(0.5).public[0].std()


def test_near_equals_flip_and_unequals_do_not() -> None:
    played = worlds()
    assert played.flips(0, 1) > 0.1
    assert played.flips(0, 2) == pytest.approx(0, abs=0.01)
    assert played.flips(1, 1) == 0
    assert played.regret >= 0


@pytest.mark.parametrize("metric", ["macro_f1", "log_loss"])
def test_other_metrics(metric: str) -> None:
    played = worlds(metric=metric, reps=40)
    assert shakeup.two_finals(played)[0] == int((played.sign * played.private.mean(axis=1)).argmax())


def test_groups_stay_on_one_side() -> None:
    probs, target, _ = members((2.0,), rows=200)
    one = draw(list(probs), ["a"], np.eye(5)[target], METRICS["accuracy"], 0.5, np.repeat([0, 1], 100), reps=50)
    assert len(set(one.public[0].round(6))) <= 2


def test_the_hedge_errs_elsewhere() -> None:
    """A twin of the best is no hedge, even if it is second best."""
    rng = np.random.default_rng(0)
    best, other = (np.eye(2)[(rng.random(400) < share).astype(int)] for share in (0.15, 0.16))
    chance = np.full((400, 2), 0.0)
    chance[:, 0], chance[:, 1] = 0.85, 0.15
    played = draw([best, best, other], ["best", "twin", "other"], chance, METRICS["accuracy"], 0.3, reps=400)
    assert set(shakeup.two_finals(played)) in ({0, 2}, {1, 2})


def test_the_shake_up_is_told() -> None:
    assert any("Two final submissions" in line for line in shakeup.told(worlds(), 0.3))


def test_one_candidate_is_both_finals() -> None:
    probs, target, _ = members((2.0,), rows=100)
    alone = draw(list(probs), ["a"], np.eye(5)[target], METRICS["accuracy"], 0.5, reps=20)
    assert shakeup.two_finals(alone) == (0, 0)


def test_worlds_without_a_score_are_left_out_and_one_image_plays_no_boards() -> None:
    """AUC needs both classes on both boards."""
    chance = np.eye(2)[(np.arange(60) < 3).astype(int)]
    good, other = 0.8 * chance + 0.1, np.full((60, 2), 0.5)
    played = draw([good, other], ["good", "other"], chance, METRICS["auc"], 0.3, reps=200)
    assert 30 <= played.public.shape[1] < 200
    assert np.isfinite(played.gap).all()
    assert not any("nan" in line for line in shakeup.told(played, 0.3))
    alone = shakeup.draw([good[:1], other[:1]], ["good", "other"], chance[:1], METRICS["accuracy"], 0.3, reps=20)
    assert alone is None
    single = shakeup.draw([good, other], ["good", "other"], np.eye(2)[np.zeros(60, int)], METRICS["auc"], 0.3, reps=40)
    assert single is None
    assert shakeup.told(alone, 0.3) == []
