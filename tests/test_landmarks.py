"""Landmarks: original 004's files go in, its exact submission comes out; twins and hold-out shares are as asked."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from octofold.blend import submission
from octofold.commands import Prepare
from octofold.errors import UserError
from octofold.nets import landmarks
from octofold.predictions import Predictions
from octofold.prepare import folds, preparing

NAMES = ("left_eye", "nose", "right_eye")


def write_world(folder: Path, count: int = 12) -> None:
    """Twelve photos with five landmarks each, tab-separated; two test photos, three points asked of each."""
    random = np.random.default_rng(0)
    for part, size in (("train", count), ("test", 2)):
        (folder / part).mkdir(parents=True)
        for number in range(size):
            pixels = random.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).resize((100, 80)).save(folder / part / f"{number}.jpg")
    points = random.integers(0, 80, (count, 10))
    header = ["file_name", *(f"Point_M{p}_{axis}" for p in range(5) for axis in "XY")]
    rows = ["\t".join(map(str, [f"{n}.jpg", *points[n]])) for n in range(count)]
    (folder / "landmarks.csv").write_text("\n".join(["\t".join(header), *rows]) + "\n")
    (folder / "test_points.csv").write_text("file_name\tpoint_index_list\n1.jpg\t[4, 0, 2]\n0.jpg\t[1, 3, 4]\n")


def make_config(folder: Path, **changes: object) -> Prepare:
    known: dict[str, object] = {
        "competition": "faces",
        "task": "keypoints",
        "images": folder / "train",
        "labels": folder / "landmarks.csv",
        "image_column": "file_name",
        "test_images": folder / "test",
        "test_points": folder / "test_points.csv",
        "group": "none",
        "out": folder / "out",
    }
    known |= {} if "holdout" in changes else {"folds": 3}
    return Prepare.model_validate(known | changes)


def test_the_submission_of_004_is_exact(tmp_path: Path) -> None:
    write_world(tmp_path)
    made = preparing.prepare(make_config(tmp_path))
    assert made.test is not None
    assert made.manifest.classes == tuple(f"Point_M{p}" for p in range(5))
    values = np.arange(20, dtype=np.float32).reshape(2, 5, 2) + 0.6
    said = Predictions(made.test.sample_ids, values, made.test.classes, "h", "m", "s", "none")
    text = submission.write(said, made.test, tmp_path / "submission.csv").read_text().splitlines()
    axes = [f"Point_M{place}_{axis}" for place in range(3) for axis in "XY"]
    assert text[0] == ",".join(["file_name", *axes])
    row = {line.split(",")[0]: line.split(",")[1:] for line in text[1:]}
    place = {name: index for index, name in enumerate(made.test.table["path"])}
    for name, asked in (("1.jpg", [4, 0, 2]), ("0.jpg", [1, 3, 4])):
        wanted = np.rint(values[place[name], asked]).astype(int).reshape(-1)
        assert row[name] == [str(number) for number in wanted], "rounded, not cut off"


def test_asked_points_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    for text, words in (
        ("file_name\tp\na\t[1, 9]\n", "0..4"),
        ("file_name\tp\na\t[1, x]\n", "0..4"),
        ("file_name\tp\na\t[1]\na\t[2]\n", "again"),
        ("file_name\tp\na\t[1]\nb\t[2, 3]\n", "as many points"),
        ("a\n", "two columns"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            landmarks.read_asked(path, 5, "file_name")
    path.write_text('name,points\na,"3, 1"\nb,"0 2"\n')
    assert landmarks.read_asked(path, 5, "file_name") == {"a": [3, 1], "b": [0, 2]}


def test_a_test_image_nobody_asks_about_is_named(tmp_path: Path) -> None:
    write_world(tmp_path)
    (tmp_path / "test_points.csv").write_text("file_name\tpoint_index_list\n1.jpg\t[4, 0, 2]\n")
    with pytest.raises(UserError, match="none for 0.jpg"):
        preparing.prepare(make_config(tmp_path))


def test_twins_come_from_names_or_a_file(tmp_path: Path) -> None:
    assert landmarks.swap_table("", NAMES) is None
    assert landmarks.swap_table("none", NAMES) == [0, 1, 2]
    assert landmarks.swap_table("left_eye:right_eye", NAMES) == [2, 1, 0]
    for text in ("[2, 1, 0]", '[["left_eye", "right_eye"]]'):
        (tmp_path / "swap.json").write_text(text)
        assert landmarks.swap_table(str(tmp_path / "swap.json"), NAMES) == [2, 1, 0]
    for text, words in (
        ("left_eye:chin", "left_eye:chin"),
        ("left_eye:nose,nose:right_eye", "one pair"),
        ("left_eye", "LEFT:RIGHT"),
    ):
        with pytest.raises(UserError, match=words):
            landmarks.swap_table(text, NAMES)
    (tmp_path / "swap.json").write_text("[]")
    assert landmarks.swap_table(str(tmp_path / "swap.json"), NAMES) == [0, 1, 2]
    for text, words in (
        ("{left: right}", "valid JSON"),
        ('[1, "a"]', "pairs of names"),
        ('{"a": "b"}', "pairs of names"),
    ):
        (tmp_path / "swap.json").write_text(text)
        with pytest.raises(UserError, match=words):
            landmarks.swap_table(str(tmp_path / "swap.json"), NAMES)
    write_world(tmp_path / "w")
    made = preparing.prepare(make_config(tmp_path / "w", swap="Point_M0:Point_M3", test_points=None))
    assert made.manifest.info["swap"] == [3, 1, 2, 0, 4]
    with pytest.raises(UserError, match="--task keypoints"):
        preparing.check(make_config(tmp_path / "w", task="classify"))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.3, 0.5])
def test_a_share_is_held_out_by_class_and_group(share: float) -> None:
    random = np.random.default_rng(0)
    groups = np.repeat([f"g{n}" for n in range(300)], 2)
    labels = np.repeat(random.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1]), 2)
    fold = folds.hold_out(groups, labels, share)
    assert set(fold) == {0, 1}
    assert abs((fold == 0).mean() - share) < 0.02
    assert not folds.crossing(groups, fold)
    for name in "abc":
        assert abs((fold[labels == name] == 0).mean() - share) < 0.06
    np.testing.assert_array_equal(fold, folds.hold_out(groups, labels, share))
    assert (fold != folds.hold_out(groups, labels, share, seed=1)).any()


def test_prepare_holds_out(tmp_path: Path) -> None:
    write_world(tmp_path)
    made = preparing.prepare(make_config(tmp_path, holdout=0.25))
    assert pd.Series(made.manifest.fold).value_counts().to_dict() == {1: 9, 0: 3}
