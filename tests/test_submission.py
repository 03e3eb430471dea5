"""A submission has the sample's rows and columns, or it is not written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from octofold.blend import submission
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.predictions import Predictions

NAMES = {"s1": ["b.jpg"], "s2": ["a.jpg", "copy of a.jpg"], "s3": ["c.jpg"]}


def toy_set(
    folder: Path, sample: str | None = "image,label\nc.jpg,x\na.jpg,x\nb.jpg,x\ncopy of a.jpg,x\n", **info: Any
) -> Manifest:
    """Three images of four names, beside a sample submission."""
    if sample is not None:
        (folder / "sample.csv").write_text(sample, encoding="utf-8")
        info = {"sample_submission": "sample.csv", "image_column": "image", "label_column": "label", **info}
    table = pd.DataFrame({"sample_id": list(NAMES), "path": "x.jpg", "names": [json.dumps(v) for v in NAMES.values()]})
    return Manifest(table, "classify", ("1", "2", "10"), "toy", folder, info, folder / "test.csv")


def predicted(**changes: Any) -> Predictions:
    values = np.array([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], np.float32)
    made = Predictions(np.array(list(NAMES)), values, ("1", "2", "10"), "hash", "blend", "sha", "none")
    return replace(made, **changes)


def test_rows_follow_the_sample_and_duplicates_get_the_same_label(tmp_path: Path) -> None:
    path = submission.write(predicted(), toy_set(tmp_path), tmp_path / "out" / "submission.csv", "int")
    assert path.read_text() == "image,label\nc.jpg,2\na.jpg,1\nb.jpg,10\ncopy of a.jpg,1\n"


def test_columns_are_matched_by_class_name(tmp_path: Path) -> None:
    turned = predicted().reorder(("10", "2", "1"))
    path = submission.write(turned, toy_set(tmp_path), tmp_path / "submission.csv")
    assert pd.read_csv(path)["label"].tolist() == [2, 1, 10, 1]


def test_odd_column_names_and_probabilities(tmp_path: Path) -> None:
    test = toy_set(tmp_path, "0,0.1\na.jpg,9\n", image_column="0", label_column="0.1")
    assert submission.write(predicted(), test, tmp_path / "a.csv").read_text() == "0,0.1\na.jpg,1\n"
    test = toy_set(tmp_path, "image,2,10,1\nb.jpg,0,0,0\n", style="probabilities")
    row = pd.read_csv(submission.write(predicted(), test, tmp_path / "b.csv")).iloc[0]
    assert row[["1", "2", "10"]].tolist() == pytest.approx([0.1, 0.2, 0.7])


def test_labels_with_leading_zeros_are_written_as_they_were_read(tmp_path: Path) -> None:
    test = toy_set(
        tmp_path, "image,label\na.jpg,001\nb.jpg,001\n", label_type="int", spelling={"1": "001", "10": "010"}
    )
    assert submission.write(predicted(), test, tmp_path / "a.csv").read_text() == "image,label\na.jpg,001\nb.jpg,010\n"
    spelling = {"1": "01", "2": "02"}
    test = toy_set(tmp_path, "image,02,10,01\nb.jpg,0,0,0\n", style="probabilities", spelling=spelling)
    row = pd.read_csv(submission.write(predicted(), test, tmp_path / "b.csv")).iloc[0]
    assert row[["01", "02", "10"]].tolist() == pytest.approx([0.1, 0.2, 0.7])


def test_a_name_in_another_unicode_form_is_written_as_it_was_read(tmp_path: Path) -> None:
    test = toy_set(tmp_path, "image,label\na.jpg,x\n", spelling={"1": "cafe\u0301"})
    assert submission.write(predicted(), test, tmp_path / "a.csv").read_text() == "image,label\na.jpg,cafe\u0301\n"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_cells_are_separated_as_in_the_sample(tmp_path: Path, separator: str) -> None:
    rows = ['"image"', "label"], ["a.jpg", "x"], ["b.jpg", "x"]
    sample = "\ufeff" + "\r\n".join(map(separator.join, rows))
    path = submission.write(predicted(), toy_set(tmp_path, sample), tmp_path / "submission.csv", "int")
    assert path.read_text() == "image,label\na.jpg,1\nb.jpg,10\n".replace(",", separator)


def test_without_a_sample_every_name_gets_a_row(tmp_path: Path) -> None:
    path = submission.write(predicted(), toy_set(tmp_path, None), tmp_path / "submission.csv")
    assert sorted(pd.read_csv(path)["image"]) == ["a.jpg", "b.jpg", "c.jpg", "copy of a.jpg"]


def test_points(tmp_path: Path) -> None:
    test = toy_set(tmp_path, "image,nose_x,nose_y\na.jpg,0,0\n")
    test = replace(test, task="keypoints", classes=("nose",))
    points = np.array([[[1, 2]], [[3.5, 4.25]], [[5, 6]]], np.float32)
    path = submission.write(predicted(values=points, classes=("nose",)), test, tmp_path / "submission.csv")
    assert path.read_text() == "image,nose_x,nose_y\na.jpg,3.5,4.25\n"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ("image,label\nz.jpg,x\n", "z.jpg"),
        ("image,label\na.jpg,x\na.jpg,x\n", "two rows"),
        ("image,label,usage\na.jpg,x,public\n", "usage"),
        ("file,label\na.jpg,x\n", "a column 'image'"),
    ],
)
def test_bad_samples_are_refused_and_nothing_is_written(tmp_path: Path, sample: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        submission.write(predicted(), toy_set(tmp_path, sample), tmp_path / "out" / "submission.csv")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_missing_prediction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: c\.jpg"):
        submission.write(predicted().take(["s1", "s2"]), toy_set(tmp_path), tmp_path / "submission.csv")
