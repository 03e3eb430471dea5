"""Harden: which rows are easy, by each of its meanings; which rows a pair expert trains on; what is refused."""

from pathlib import Path

import numpy as np
import pytest

from octofold.errors import UserError
from octofold.predictions import Predictions
from octofold.recipe import Augment, Easy, Phase
from octofold.train.harden import easy_rows, row_presets, wanted_rows

CLASSES = ("apple", "kiwi", "pear")
TARGET = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
TRAIN = np.arange(10)  # apple 4, kiwi 3, pear 3 of 5
IDS = np.array([f"id{row:02d}" for row in range(len(TARGET))])


def write_oof(folder: Path, confidence: list[float], wrong: set[int], fold: bool = True) -> Path:
    """OOF in another row and class order, because it is aligned by name."""
    probs = np.zeros((len(TARGET), 3), np.float32)
    for row, sure in enumerate(confidence):
        said = (TARGET[row] + 1) % 3 if row in wrong else TARGET[row]
        probs[row] = (1 - sure) / 2
        probs[row, said] = sure
    order, columns = np.random.default_rng(0).permutation(len(TARGET)), [2, 0, 1]
    return Predictions(
        sample_ids=IDS[order],
        values=probs[order][:, columns],
        classes=tuple(CLASSES[column] for column in columns),
        manifest_hash="h",
        member="m",
        model_sha="s",
        views="none",
        fold=np.zeros(len(TARGET), np.int64) if fold else None,
    ).save(folder / "oof.parquet")


def test_frequent_classes_are_easy_as_in_the_original() -> None:
    found = easy_rows(Easy(by="frequency", count=1), TARGET, TRAIN, CLASSES, IDS)
    assert set(TARGET[found]) == {0}, "counted on the training rows, where apple leads; over all rows pear would"


def test_accurate_classes_are_easy_by_oof(tmp_path: Path) -> None:
    oof = write_oof(tmp_path, [0.9] * len(TARGET), wrong={0, 4, 5, 10, 11})
    found = easy_rows(Easy(by="accuracy", count=1, oof=oof), TARGET, TRAIN, CLASSES, IDS)
    assert set(TARGET[found]) == {2}, "pear is right on all its training rows"


def test_sure_and_right_samples_are_easy(tmp_path: Path) -> None:
    confidence = [0.4, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9, 0.95, 0.95, 0.95, 0.99, 0.99]
    oof = write_oof(tmp_path, confidence, wrong={3})
    found = easy_rows(Easy(by="confidence", quantile=0.15, oof=oof), TARGET, TRAIN, CLASSES, IDS)
    assert np.flatnonzero(found).tolist() == [2, 4, 5, 6, 7, 8, 9], "unsure, wrong and held-out rows are not"


def test_rows_get_their_presets() -> None:
    augment = Augment(preset="no_color", easy=Easy(classes=["kiwi"]))
    harden = Phase(augment="hard_light", easy_augment="easy_strong")
    presets = row_presets(harden, augment, TARGET, TRAIN, CLASSES, IDS)
    assert [name == "easy_strong" for name in presets] == (TARGET == 1).tolist()
    assert set(presets) == {"easy_strong", "hard_light"}
    assert row_presets(Phase(), augment, TARGET, TRAIN, CLASSES, IDS) == "no_color"
    with pytest.raises(UserError, match="keypoints"):
        row_presets(harden, augment, np.zeros((3, 2, 2)), TRAIN, ("nose", "tail"), IDS)


def test_oof_must_be_there_and_out_of_fold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train a member first"):
        easy_rows(Easy(by="accuracy"), TARGET, TRAIN, CLASSES, IDS)
    test = write_oof(tmp_path, [0.9] * len(TARGET), wrong=set(), fold=False)
    with pytest.raises(UserError, match="out-of-fold"):
        easy_rows(Easy(by="confidence", oof=test), TARGET, TRAIN, CLASSES, IDS)
    with pytest.raises(UserError, match="plum"):
        easy_rows(Easy(classes=["plum"]), TARGET, TRAIN, CLASSES, IDS)


def test_a_pair_expert_wants_its_pair_alone() -> None:
    assert wanted_rows([], TARGET, CLASSES).all()
    assert set(TARGET[wanted_rows(["kiwi", "pear"], TARGET, CLASSES)]) == {1, 2}
    for bad in (["kiwi"], ["kiwi", "plum"]):
        with pytest.raises(UserError, match="two or more of"):
            wanted_rows(bad, TARGET, CLASSES)
