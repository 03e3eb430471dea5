"""Shift is seen where it is and not where it is not."""

import numpy as np
import pytest

from octofold.blend import assembly, drawing, forecast, rehearsal, shift, verdict
from octofold.metrics import METRICS, accuracy
from test_blending import members


def world(rows: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities of a classifier on a task of a given noise, and the truth."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(np.full(6, noise), rows)
    target = (rng.random((rows, 1)) > chance.cumsum(axis=1)).sum(axis=1).clip(0, 5)
    return chance.astype(np.float32), target


def test_exchangeable_rows_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(0)
    auc, error = shift.adversarial_auc(rng.normal(size=(300, 40)), rng.normal(size=(400, 40)))
    assert abs(auc - 0.5) < 3 * error
    auc, _ = shift.adversarial_auc(rng.normal(size=(300, 40)), rng.normal(size=(400, 40)) + 0.7)
    assert auc > 0.9


def test_distance_uses_held_out_rows_and_names_the_nearest() -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(200, 16))
    held = np.arange(200) < 40
    test = train[[50, 60, 70] * 10] + 0.01 * rng.normal(size=(30, 16))
    found = shift.measure(train, held, test)
    assert found.nearest[:3, 0].tolist() == [50, 60, 70]
    assert found.nn_test > 0.99 > found.nn_held
    assert found.similarity.shape == (30, 3)


def test_without_shift_the_folds_are_believed() -> None:
    oof, target = world(1500, 0.2, 0)
    test, truth = world(1200, 0.2, 1)
    same = shift.Distance(0.5, 0.02, 0.7, 0.7, np.zeros((1200, 3), int), np.zeros((1200, 3)))
    found = shift.foresee(oof, target, [test, test], 0.01, same)
    assert found.accuracy.value == pytest.approx(found.oof, abs=0.03)
    assert found.accuracy.low <= accuracy(test, truth) <= found.accuracy.high


def test_rows_of_one_group_leave_the_forecast_wide() -> None:
    oof, target = world(1500, 0.2, 0)
    sure, unknown = (shift.foresee(oof, target, [oof], spread).accuracy for spread in (0.01, float("nan")))
    assert unknown.high - unknown.low > 5 * (sure.high - sure.low)


def test_members_that_disagree_more_are_expected_to_be_less_right() -> None:
    probs, target, _ = members((2.0, 2.0), rows=1500)
    weaker, _, _ = members((1.0, 1.0), rows=1500)
    alone = shift.foresee(probs.mean(axis=0), target, [probs.mean(axis=0)], 0.01)
    found = shift.foresee(probs.mean(axis=0), target, [weaker.mean(axis=0)], 0.01, None, (probs, [weaker]))
    assert alone.flatter == pytest.approx(0, abs=1e-6)
    assert found.parts["agreement_test"] < found.parts["agreement_oof"]
    assert found.accuracy.low <= accuracy(weaker.mean(axis=0), target) <= found.accuracy.high < found.oof


def test_less_sure_models_are_expected_to_be_less_right() -> None:
    oof, target = world(1500, 0.1, 0)
    test, truth = world(1200, 0.2, 1)
    moved = shift.Distance(0.9, 0.02, 0.7, 0.5, np.zeros((1200, 3), int), np.zeros((1200, 3)))
    found = shift.foresee(oof, target, [test], 0.01, moved)
    assert found.flatter > 0.05
    assert found.accuracy.low <= accuracy(test, truth) <= found.accuracy.high
    assert shift.atc(oof, target, oof) == pytest.approx(found.oof, abs=0.01)


def test_temperature_finds_the_power_that_was_hidden() -> None:
    chance, target = world(4000, 0.5, 0)
    assert shift.temperature(shift.tempered(chance, 2.0), target) == pytest.approx(0.5, rel=0.15)


def test_a_score_that_no_draw_of_labels_has_is_not_foretold() -> None:
    """One image is of one class: no AUC."""
    test, target = world(300, 0.3, 0)
    outlook = shift.Outlook(shift.Interval(0.8, 0.75, 0.84), 0.85, {}, about=["sampling"])
    auc = METRICS["auc"]
    foretold = forecast.Forecast("auc", drawing.derived(test[:1], outlook, auc, test, target), outlook)
    assert not foretold.is_known
    judged = verdict.judge("equal", np.stack([test, test]), ["a", "b"], target, np.arange(300) % 3, np.arange(300), auc)
    said = " ".join(foretold.told(judged))
    assert "No estimate of auc for these test images" in said
    assert "nan" not in said
    assert assembly._numbers(judged, foretold, "auc")["estimate/auc"] == judged.score.value


def test_near_certainty_the_interval_still_reaches_what_can_be_counted() -> None:
    """Two errors among 1437 held-out rows: all of 360 test images right is nothing unusual."""
    oof = np.full((1437, 3), 0.005)
    oof[:, 0] = 0.99
    target = np.zeros(1437, int)
    target[:2] = 1
    found = shift.foresee(oof, target, [oof[:360]], 0.001)
    assert found.accuracy.high == 1.0
    assert 0.98 < found.accuracy.low < 0.998
    perfect = shift.foresee(oof, np.zeros(1437, int), [oof[:360]], 0.0)
    assert 0.98 < perfect.accuracy.low < 1 == perfect.accuracy.high


def test_the_nearest_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows, keys = rng.normal(size=(17, 5)), rng.normal(size=(40, 5))
    like = rows @ keys.T
    wanted = np.argsort(-like, axis=1)[:, :3]
    for room in (2**25, 120, 1):
        monkeypatch.setattr(shift, "ROOM", room)
        places, values = shift._nearest(rows, keys, 3)
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_allclose(values, np.take_along_axis(like, wanted, axis=1))
    assert shift._nearest(rows, keys[:2], 3)[0].shape == (17, 2)


def test_a_rehearsal_learns_how_much_confidence_overlooks() -> None:
    """Clusters far from all others are judged with unshaken confidence, and wrongly: accuracy falls the faster."""
    rng = np.random.default_rng(0)
    centres = 2.5 * rng.normal(size=(4, 3, 8))
    target, part = rng.integers(0, 4, 900), rng.integers(0, 3, 900)
    slope = rehearsal.rehearse(centres[target, part] + rng.normal(size=(900, 8)), target)
    assert 1.0 <= slope <= 3.5
    assert slope != shift.SURENESS
    assert rehearsal.rehearse(rng.normal(size=(20, 5)), np.repeat([0, 1], 10)) == shift.SURENESS
