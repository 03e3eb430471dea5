"""Scores agree with scikit-learn's, and with what they say of themselves."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from octofold import metrics
from octofold.errors import UserError
from octofold.metrics import METRICS, adopt, calibration_error, confusion, fingerprint, point_mse, point_nme


def sample(seed: int, classes: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), rows), np.r_[np.arange(classes), rng.integers(0, classes, rows - classes)]


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_classification_scores_are_sklearns(seed: int, classes: int) -> None:
    probs, target = sample(seed, classes)
    called = probs.argmax(axis=1)
    expected = {
        "accuracy": reference.accuracy_score(target, called),
        "balanced_accuracy": reference.balanced_accuracy_score(target, called),
        "macro_f1": reference.f1_score(target, called, average="macro", labels=np.union1d(target, called)),
        "log_loss": reference.log_loss(target, np.clip(probs, 1e-7, 1), labels=np.arange(classes)),
        "quadratic_kappa": reference.cohen_kappa_score(target, called, weights="quadratic"),
        "auc": reference.roc_auc_score(target, probs[:, 1] if classes == 2 else probs, multi_class="ovr"),
    }
    for name, value in expected.items():
        assert METRICS[name].score(probs, target) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("name", [name for name, row in METRICS.items() if row.task == "classify"])
def test_the_truth_scores_best(name: str) -> None:
    _, target = sample(1, 4)
    truth = np.eye(4)[target]
    wrong = np.eye(4)[(target + 1) % 4]
    better, worse = METRICS[name].score(truth, target), METRICS[name].score(wrong, target)
    assert (better > worse) == METRICS[name].higher_is_better


def test_brier_is_the_squared_distance() -> None:
    probs, target = sample(2, 5)
    assert METRICS["brier"].score(probs, target) == pytest.approx(((probs - np.eye(5)[target]) ** 2).sum(axis=1).mean())


def test_a_class_nobody_has_does_not_count_in_macro_f1() -> None:
    probs = np.eye(3)[[0, 1, 0]]
    assert METRICS["macro_f1"].score(probs, np.array([0, 1, 0])) == 1.0


def test_calibration_error_of_an_honest_and_a_boasting_model() -> None:
    target = np.array([0] * 70 + [1] * 30)
    assert calibration_error(np.tile([0.7, 0.3], (100, 1)), target) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.tile([1.0, 0.0], (100, 1)), target) == pytest.approx(0.3)


def test_confusion_counts_every_row_once() -> None:
    table = confusion(np.array([1, 1, 0]), np.array([0, 1, 2]), 3)
    assert table.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_points_without_truth_do_not_count() -> None:
    target = np.array([[[0.0, 0.0], [np.nan, np.nan], [3.0, 4.0]]])
    points = np.array([[[1.0, 0.0], [99.0, 99.0], [3.0, 4.0]]])
    assert point_mse(points, target) == pytest.approx(0.25)
    assert point_nme(points, target) == pytest.approx((1 / 5 + 0) / 2)
    alone = target.copy()
    alone[0, 1:] = np.nan  # one visible point: no spread to measure by
    more = np.concatenate([target, alone]), np.concatenate([points + 3, points])
    assert point_nme(more[1], more[0]) == pytest.approx(point_nme(points + 3, target))
    assert np.isnan(point_nme(points, alone[:1].repeat(len(points), 0)))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's, in a table of metrics that is put back afterwards."""
    monkeypatch.setattr(metrics, "METRICS", dict(METRICS))
    return tmp_path / "mine.py"


def test_a_function_of_the_users_is_a_metric(own: Path) -> None:
    own.write_text(
        "import numpy as np\n"
        "def top2(values, target):\n"
        "    return (np.argsort(values, axis=1)[:, -2:] == target[:, None]).any(axis=1).mean()\n"
        "def misses(values, target):\n"
        "    return int((values.argmax(axis=1) != target).sum())\n"
        "misses.lower_is_better = True\n"
    )
    probs, target = sample(0, 4)
    assert adopt(f"{own}:top2", "classify") == "top2"
    assert adopt(f"{own}:misses", "classify") == "misses"
    assert adopt(f"{own}:top2", "classify") == "top2"
    assert metrics.METRICS["top2"].score(probs, target) == reference.top_k_accuracy_score(target, probs, k=2)
    assert metrics.METRICS["top2"].higher_is_better
    assert not metrics.METRICS["misses"].higher_is_better
    assert metrics.METRICS["misses"].score(probs, target) == round((1 - METRICS["accuracy"].score(probs, target)) * 60)
    assert list(fingerprint(f"{own}:top2")) == ["metric.sha256"]
    assert fingerprint("accuracy") == {}


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", "f", "functions: none"),
        ("def g(a, b): return 1\n", "f", "functions: g"),
        ("def f(a): return 1\n", "f", r"f\(a\)"),
        ("x = 1 / 0\ndef f(a, b): return 1\n", "f", r"ZeroDivisionError: division by zero \(line 1\)"),
        ("def f(a, b:\n", "f", "SyntaxError"),
        ("def accuracy(a, b): return 1\n", "accuracy", "a name of its own"),
    ],
)
def test_a_file_that_holds_no_metric_is_refused(own: Path, text: str, name: str, words: str) -> None:
    own.write_text(text)
    with pytest.raises(UserError, match=words):
        adopt(f"{own}:{name}", "classify")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "one finite number"),
        ("return float('nan')", "one finite number"),
        ("return values.max(axis=1)", "one finite number"),
        ("values[0] = 1; return 0.0", r"read-only \(line 2\)"),
        ("return values[:, 99].mean()", r"IndexError.*line 2.*\(60, 4\)"),
    ],
)
def test_what_a_users_metric_does_wrong_is_said(own: Path, body: str, words: str) -> None:
    own.write_text(f"def f(values, target):\n    {body}\n")
    score = metrics.METRICS[adopt(f"{own}:f", "classify")].score
    with pytest.raises(UserError, match=words):
        score(*sample(0, 4))


def test_unknown_metrics_are_refused(own: Path) -> None:
    with pytest.raises(UserError, match=r"one of accuracy.*or path/to/file.py:function"):
        adopt("acuracy", "classify")
    with pytest.raises(UserError, match="one of mse"):
        adopt("accuracy", "keypoints")
    with pytest.raises(UserError, match="no such file"):
        adopt(f"{own}:f", "classify")
