"""Every row of METHODS keeps the same promises; the exact programs are exact."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize

from octofold.blend import blending, solvers
from octofold.errors import UserError
from octofold.infer.combining import RULES, Blend
from octofold.metrics import METRICS, accuracy, brier, log_loss, point_mse

Array = npt.NDArray[Any]


def members(strengths: tuple[float, ...] = (1.0, 1.5, 2.0, 0.3), rows: int = 600, classes: int = 5) -> Any:
    """Members that know the truth more or less well: ``(M, N, K)``, target, fold."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, classes, rows)
    logits = rng.normal(size=(len(strengths), rows, classes))
    logits[:, np.arange(rows), target] += np.array(strengths)[:, None]
    probs = np.exp(2 * logits)
    return (probs / probs.sum(axis=2, keepdims=True)).astype(np.float32), target, np.arange(rows) % 5


@pytest.mark.parametrize("method", blending.METHODS)
def test_result_is_probabilities_and_survives_json(method: str) -> None:
    probs, target, fold = members()
    blend = blending.fit(method, probs, target, fold)
    assert blend.rule in RULES
    assert blend.weights.min() >= 0
    assert blend.weights.sum() == pytest.approx(1)
    blended = blend.apply(probs)
    assert blended.shape == probs.shape[1:]
    assert blended.min() >= 0
    np.testing.assert_allclose(blended.sum(axis=1), 1, atol=1e-5)
    again = Blend.from_dict(json.loads(json.dumps(blend.to_dict())))
    np.testing.assert_array_equal(again.apply(probs), blended)


@pytest.mark.parametrize("method", blending.METHODS)
def test_one_member_is_itself(method: str) -> None:
    probs, target, fold = members((1.0,))
    np.testing.assert_allclose(blending.fit(method, probs, target, fold).apply(probs), probs[0], atol=1e-6)


@pytest.mark.parametrize("method", blending.METHODS)
def test_rows_that_may_not_be_seen_change_nothing(method: str) -> None:
    """The leak probe: garbage in the held-out rows, the same blend out."""
    probs, target, fold = members()
    garbled, wrong = probs.copy(), target.copy()
    garbled[:, fold == 0] = probs[:, fold == 0, ::-1]
    wrong[fold == 0] = (target[fold == 0] + 1) % 5
    one = blending.fit(method, probs, target, fold, fold != 0)
    other = blending.fit(method, garbled, wrong, fold, fold != 0)
    np.testing.assert_allclose(one.apply(probs), other.apply(probs), atol=1e-6)


@pytest.mark.parametrize("method", blending.METHODS)
def test_twins_constants_and_a_class_absent_from_a_fold_are_no_trouble(method: str) -> None:
    probs, target, fold = members((1.0, 2.0))
    constant = np.full_like(probs[:1], 1 / probs.shape[2])
    odd = np.concatenate([probs, probs[1:], constant])
    fold = np.where(target == 4, 0, 1 + fold % 4)  # class 4 is in fold 0 only
    for rows in (None, fold != 0):
        blend = blending.fit(method, odd, target, fold, rows)
        assert np.isfinite(blend.apply(odd)).all()
        assert accuracy(blend.apply(odd), target) > accuracy(constant[0], target)


@pytest.mark.parametrize("method", blending.METHODS)
def test_rows_are_blended_one_by_one(method: str) -> None:
    """A row's blend does not depend on which others come with it: the blend can be served."""
    probs, target, fold = members()
    blend = blending.fit(method, probs, target, fold)
    np.testing.assert_allclose(blend.apply(probs[:, 7:8]), blend.apply(probs)[7:8], atol=1e-6)


def test_simplex_is_the_best_brier_score() -> None:
    probs, target, _ = members()
    blend = blending.fit("simplex", probs, target)
    found = brier(blend.apply(probs), target)
    assert found <= min(brier(member, target) for member in probs) + 1e-7
    gram = solvers.gram(probs, target).residual
    slsqp = minimize(
        lambda w: w @ gram @ w,
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )
    np.testing.assert_allclose(blend.weights, slsqp.x, atol=2e-3)
    slope = 2 * gram @ blend.weights  # optimal: equal slopes where weight is, none lower elsewhere
    assert slope.min() >= blend.weights @ slope - 1e-3 * abs(slope).max()


def test_log_loss_is_the_best_log_loss() -> None:
    probs, target, _ = members()
    best = blending.fit("log_loss", probs, target)
    value = log_loss(best.apply(probs), target)
    rng = np.random.default_rng(1)
    for trial in rng.dirichlet(np.ones(4), 200):
        assert value <= log_loss(np.tensordot(trial, probs, 1), target) + 1e-6
    chance = probs[:, np.arange(len(target)), target]
    slope = (chance / (best.weights @ chance)).mean(
        axis=1
    )  # Karush-Kuhn-Tucker: 1 where weight is, at most 1 elsewhere
    np.testing.assert_allclose(slope[best.weights > 0], 1, atol=1e-3)
    assert slope.max() < 1 + 1e-3


def test_lr_mse_is_original_000s() -> None:
    from sklearn.linear_model import LinearRegression

    probs, target, _ = members()
    truth = np.eye(5)[target].ravel()
    raw = LinearRegression(fit_intercept=False, positive=True).fit(probs.reshape(4, -1).T, truth).coef_.clip(0)
    np.testing.assert_allclose(blending.fit("lr_mse", probs, target).weights, raw / raw.sum(), atol=1e-4)


def test_grams_add_up_over_folds_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, target, fold = members()
    whole = solvers.gram(probs, target)
    parts = [solvers.gram(probs, target, fold == held) for held in range(5)]
    np.testing.assert_allclose(sum(part.residual for part in parts), whole.residual, rtol=1e-5)
    monkeypatch.setattr(solvers, "CHUNK", 7)
    np.testing.assert_allclose(solvers.gram(probs, target).residual, whole.residual, rtol=1e-5)


@pytest.mark.parametrize("method", blending.POINT_METHODS)
def test_points(method: str) -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 100, (80, 3, 2)).astype(np.float32)
    noise = rng.normal(size=(3, 80, 3, 2)) * np.array([1, 2, 8])[:, None, None, None]
    said, holed = (truth + noise).astype(np.float32), truth.copy()
    holed[::4, 1] = np.nan
    blend = blending.fit(method, said, holed)
    assert blend.apply(said).shape == truth.shape
    if method == "simplex":
        assert point_mse(blend.apply(said), holed) <= min(point_mse(one, holed) for one in said)
        assert blend.weights[2] < 0.05


def test_per_fold_weights_are_each_folds_own() -> None:
    probs, target, fold = members()
    table = blending.fit("lr_mse_per_fold", probs, target, fold).params["per_fold"]
    rows = fold == 3
    np.testing.assert_allclose(table["3"], blending.fit("lr_mse", probs[:, rows], target[rows]).weights, atol=1e-6)


def close_pair() -> Any:
    """Classes 0 and 1 look alike to the average, and one member can tell them apart by a hair."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, 2000)
    base = np.full((2, 2000, 4), 0.02)
    base[:, np.arange(2000), target] = 0.94
    pair = target < 2
    lean = np.where(target[pair] == 0, 1, -1) * 0.01 + rng.normal(size=pair.sum()) * 0.002
    base[:, pair, 0], base[:, pair, 1] = 0.47, 0.49
    base[1, pair, 0] += lean
    base[1, pair, 1] -= lean
    probs = (base / base.sum(axis=2, keepdims=True)).astype(np.float32)
    return probs, target, np.arange(2000) % 5


def test_cwr_does_not_raise_a_class_that_no_row_has() -> None:
    probs, target, _ = members(classes=4)
    never = np.concatenate([probs, np.full_like(probs[:, :, :1], 1e-2)], axis=2)
    blend = blending.fit("cwr", never / never.sum(axis=2, keepdims=True), target)
    assert blend.params["scale"][4] == max(blend.params["scale"])


def test_rank_never_takes_a_class_that_nobody_names() -> None:
    """Of sure members, most of what they say of a rare class is 0: that many quantiles at once."""
    rng = np.random.default_rng(0)
    target = rng.choice(4, 1000, p=[0.55, 0.3, 0.12, 0.03])
    logits = rng.normal(size=(2, 1000, 4)) + 3 * np.eye(4)[target]
    probs = np.exp(100 * (logits - logits.max(axis=2, keepdims=True))).astype(np.float32)
    probs /= probs.sum(axis=2, keepdims=True)
    called = blending.fit("rank", probs, target).apply(probs).argmax(axis=1)
    assert probs.max(axis=0)[np.arange(1000), called].min() > 0


def test_pair_gate_mends_what_only_the_pair_confuses() -> None:
    probs, target, fold = close_pair()
    gated = blending.fit("pair_gate", probs, target, fold)
    plain = blending.fit("simplex", probs, target, fold)
    assert accuracy(gated.apply(probs), target) > accuracy(plain.apply(probs), target) + 0.1


@pytest.mark.parametrize("method", ["auto", "stack", "pair_gate"])
def test_of_two_folds_the_one_that_is_seen_is_enough_to_choose(method: str) -> None:
    """The cross-fitted score of two folds is of the same blend: rows sorted by class, one fold, the same choice."""
    probs, target, fold = close_pair() if method == "pair_gate" else members((1.5, 0.0, 0.0))
    order = np.argsort(target, kind="stable")
    probs, target, fold = probs[:, order], target[order], fold[order]
    held = np.arange(len(target)) % 4 == 3
    known = blending.fit(method, probs, target, np.where(held, 9, fold), ~held)
    alone = blending.fit(method, probs, target, held.astype(int), ~held)
    assert alone.method == known.method
    assert alone.method != "auto: equal"
    if method == "stack":
        assert alone.params == known.params  # of the same strength
    assert len(alone.params.get("experts", "")) == len(known.params.get("experts", ""))
    assert method != "pair_gate" or alone.params["experts"]


@pytest.mark.parametrize(
    ("method", "shape", "words"),
    [("nonsense", (2, 9, 3), "one of"), ("stack", (2, 9, 3, 2), "for points"), ("equal", (2, 0, 3), "at least one")],
)
def test_refusals(method: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        blending.fit(method, np.zeros(shape, np.float32), np.zeros(shape[1], int))


def test_search_follows_the_metric() -> None:
    probs, target, fold = members()
    for name in ("accuracy", "macro_f1", "log_loss"):
        blend = blending.fit("dirichlet", probs, target, fold, None, METRICS[name])
        sign = 1 if METRICS[name].higher_is_better else -1
        plain = METRICS[name].score(probs.mean(axis=0), target)
        assert sign * METRICS[name].score(blend.apply(probs), target) >= sign * plain - 2e-3


def expert_world() -> Any:
    """Two members that cannot tell class 0 from 1, and one that was trained on nothing else."""
    rng = np.random.default_rng(0)
    target, fold = rng.integers(0, 4, 1200), np.arange(1200) % 5
    base = np.full((2, 1200, 4), 0.02) + 0.02 * rng.random((2, 1200, 4))
    base[:, np.arange(1200), target] = 0.9
    pair = target < 2
    base[:, pair, :2] = 0.45 + 0.04 * rng.random((2, int(pair.sum()), 2))
    expert = np.full((1, 1200, 4), 1e-3)
    says = np.where(rng.random(1200) < 0.9, target % 2, 1 - target % 2)
    expert[0, np.arange(1200), says] = 0.9
    probs = np.concatenate([base, expert])
    return (probs / probs.sum(axis=2, keepdims=True)).astype(np.float32), target, fold


@pytest.mark.parametrize("method", blending.METHODS)
def test_a_pair_expert_speaks_of_its_pair_alone(method: str) -> None:
    probs, target, fold = expert_world()
    plain = blending.fit(method, probs[:2], target, fold)
    blend = blending.fit(method, probs, target, fold, experts=[(0, 1)])
    assert blend.weights[2] == 0
    assert blend.weights.sum() == pytest.approx(1)
    blended, before = blend.apply(probs), plain.apply(probs[:2])
    assert accuracy(blended, target) > accuracy(before, target) + 0.08
    others = np.isin(before.argmax(axis=1), (2, 3))
    np.testing.assert_allclose(blended[others], before[others], atol=1e-6)
    again = Blend.from_dict(json.loads(json.dumps(blend.to_dict())))
    np.testing.assert_array_equal(again.apply(probs), blended)


def test_pair_gate_has_gates_of_its_own_beside_a_trained_pair_expert() -> None:
    """Its own were fitted on the voters alone, the trained one's on all members."""
    voters, target, fold = close_pair()
    probs = np.concatenate([voters, np.full((1, len(target), 4), 0.25, np.float32)])
    blend = blending.fit("pair_gate", probs, target, fold, experts=[(2, 3)])
    assert [len(gate["coef"]) for gate in blend.params["experts"]] == [2]
    alone = blending.fit("pair_gate", voters, target, fold)
    np.testing.assert_array_equal(blend.apply(probs), alone.apply(voters))


def test_an_expert_that_knows_nothing_is_not_heard() -> None:
    probs, target, fold = expert_world()
    probs = probs.copy()
    probs[2] = 0.25
    blend = blending.fit("equal", probs, target, fold, experts=[(0, 1)])
    assert blend.params["experts"] == []


def test_an_experts_threshold_is_chosen_without_the_rows_it_may_not_see() -> None:
    probs, target, fold = expert_world()
    wrong = np.where(fold == 0, 3 - target, target)
    one, other = (blending.fit("equal", probs, truth, fold, fold != 0, None, [(0, 1)]) for truth in (target, wrong))
    assert one.params == other.params


def test_weights_by_hand_are_taken_as_they_are_and_in_the_members_order() -> None:
    members = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 30)).astype(np.float32)
    method = blending.by_hand({"b": 0.25, "a": 0.75}, ["a", "b"])
    made = blending.fit(method, members, np.zeros(30, int))
    np.testing.assert_allclose(made.apply(members), 0.75 * members[0] + 0.25 * members[1], atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 0.7, "b": 0.7}, "a sum of 1.4"),
        ({"a": 1.5, "b": -0.5}, "smallest -0.5"),
        ({"a": float("nan"), "b": 1.0}, "shares"),
        ({"a": 1.0}, "a weight for each of a, b"),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, "a weight for each of a, b"),
    ],
)
def test_weights_by_hand_that_are_no_shares_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        blending.by_hand(weights, ["a", "b"])
