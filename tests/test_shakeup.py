"""Boards played many times."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from octofold.blend import blending, forecast, shakeup, verdict
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
    lines = shakeup.told(worlds(), worlds(), 0.3)
    assert "public minus private of good" in lines[0]
    assert lines[-1].startswith("Two final submissions: good (best estimate)")
    assert shakeup.told(worlds(), None, 0.3) == lines[:1], "too few rows with labels: no order"


def test_a_test_set_of_another_size() -> None:
    """Rows stand for as many test images as there are: fewer are noisier."""
    probs, target, _ = members((2.0, 1.9), rows=800)
    spread = [
        draw(
            list(probs), ["a", "b"], np.eye(5)[target], METRICS["accuracy"], 0.5, resample=True, tests=tests, reps=300
        ).gap
        for tests in (100, 800, 6400)
    ]
    widths = [high - low for low, _, high in spread]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_resampled_rows_are_whole_groups() -> None:
    place = np.random.default_rng(0).integers(40, size=300)
    sides = [np.flatnonzero(place < 10), np.flatnonzero(place >= 10)]
    for rows, side in zip(shakeup._resampled(sides, place, np.random.default_rng(1), 1.0), sides, strict=True):
        drawn = np.bincount(place[rows], minlength=40) / np.bincount(place, minlength=40)
        assert np.array_equal(drawn, drawn.round()), "each group comes whole, as often as it was drawn"
        assert drawn.sum() == len(np.unique(place[side]))
        assert (np.bincount(rows, minlength=300) == drawn[place]).all()


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
    assert not any("nan" in line for line in shakeup.told(played, played, 0.3))
    alone = shakeup.draw([good[:1], other[:1]], ["good", "other"], chance[:1], METRICS["accuracy"], 0.3, reps=20)
    assert alone is None
    single = shakeup.draw([good, other], ["good", "other"], np.eye(2)[np.zeros(60, int)], METRICS["auc"], 0.3, reps=40)
    assert single is None
    assert shakeup.told(alone, single, 0.3) == []


def test_a_blend_is_no_judge_of_itself() -> None:
    """A blend that out-of-fold rows show to be worse than a member is not the best estimate of the two finals."""
    probs, target, fold = members((2.5, 0.3), rows=600)
    names = ["good", "bad"]
    method = blending.by_hand({"good": 0.1, "bad": 0.9}, names)
    judged = verdict.judge(method, probs, names, target, fold, np.arange(600), METRICS["accuracy"])
    rows = SimpleNamespace(classes=range(5), target=target, groups=np.arange(600))
    lineup: Any = SimpleNamespace(names=names, voters=2, oof=probs, rows=rows)
    said: Any = SimpleNamespace(final=judged.blend.apply(probs))
    expected: Any = SimpleNamespace(outlook=SimpleNamespace(accuracy=SimpleNamespace(value=0.4)))
    config: Any = SimpleNamespace(public_share=0.3, seed=0)
    lines = forecast.shaken(config, lineup, judged, said, expected, METRICS["accuracy"])
    assert lines[-1] == "Two final submissions: member good (best estimate), equal (hedge)."
    assert any(
        f"order {judged.blend.method} and member good differently with probability 0.00" in line for line in lines
    )


def test_many_rows_are_thinned_to_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds for as many test images as before, from fewer rows with labels."""
    probs, target, _ = members((2.0, 1.0), rows=4000)
    given = (list(probs), ["good", "worse"], np.eye(5)[target], METRICS["accuracy"], 0.3, np.arange(4000) // 5, True)
    whole = draw(*given, reps=200)
    monkeypatch.setattr(shakeup, "MOST", 1000)
    seen: list[int] = []
    monkeypatch.setattr(shakeup, "_hits", lambda candidates, metric: seen.append(len(candidates[0])))
    thin = draw(*given, reps=200)
    assert 990 <= seen[0] <= 1010
    assert seen[0] % 5 == 0
    assert thin.public.std() == pytest.approx(whole.public.std(), rel=0.3)
    assert thin.flips(0, 1) == whole.flips(0, 1) == 0
