"""Every name in a user's file leads to a file inside its folder, or is refused by name; tables are never repaired."""

import csv as writers
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from octofold.errors import UserError
from octofold.prepare import places, sources

ODD_NAMES = [
    "a b.png", "груша.png", "🍏 зелёное.png", "d/e/f.png", "comma,quote\".png", "x" * 240 + ".png", "[1].png",
    "$HOME.png", "%41.png", "-rf.png", "NA.png", "#.png", "line\nbreak.png", "back\\slash.png",
]  # fmt: skip


def fill(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
    return folder


def csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, names: Sequence[str], **info: object) -> sources.Source:
    """A training part of these classes."""
    kind = "int" if all(name.isdigit() for name in names) else "str"
    return sources.Source(pd.DataFrame(), folder, tuple(names), {"label_type": kind, **info})


def test_odd_names_are_found(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos with space", ODD_NAMES)
    assert places.locate(ODD_NAMES, folder, "x.csv") == ODD_NAMES


def test_names_written_otherwise_are_found(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["d/e.png", "ё.png", "12.jpg"])
    wrote = {"d\\e.png": "d/e.png", "./d/e.png": "d/e.png", "d/../d/e.png": "d/e.png", "12": "12.jpg", " 12 ": "12.jpg"}
    wrote |= {unicodedata.normalize("NFD", "ё.png"): "ё.png", str(folder / "d" / "e.png"): "d/e.png", "d/e": "d/e.png"}
    assert places.locate(wrote, folder, "x.csv") == list(wrote.values())


@pytest.mark.parametrize(
    "name", ["../secret.png", "d/../../secret.png", "/etc/passwd", "C:\\x.png", "..\\secret.png", "link.png",
             "linked/secret.png", "linked/secret", "linked/none.png", "a\0b.png", "../" * 50 + "etc/passwd"],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "photos", ["ok.png", "d/ok.png"])
    fill(tmp_path, ["secret.png"])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(UserError, match="lead out of it") as caught:
        places.locate(["ok.png", name], folder, "x.csv")
    assert repr(name) in str(caught.value)


def test_links_inside_are_followed_and_circles_end(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["d/a.png"])
    (folder / "b.png").symlink_to("d/a.png")
    (folder / "d" / "round").symlink_to(folder)
    (folder / "another").symlink_to("d")  # whichever of the two is listed first, both names lead to the photo
    (tmp_path / "whole").symlink_to(folder)
    names = {"b.png": "b.png", "d/a.png": "d/a.png", "another/a.png": "d/a.png", "d/round/d/a": "d/a.png"}
    assert places.locate(names, tmp_path / "whole", "x.csv") == list(names.values())


def test_a_linked_class_folder_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["a/1.png", "b/2.png"])
    fill(tmp_path, ["elsewhere/3.png"])
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="1 linked: c"):
        sources.from_class_folders(folder)
    with pytest.raises(UserError, match="1 linked: c"):
        sources.from_test(folder, None, "image", "label", read(tmp_path, "ab"), "classify")


@pytest.mark.parametrize("name", ["", "gone.png", "d", ".", "x" * 5000, "~"])
def test_names_without_a_file_are_refused(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "p", ["ok.png.png", "d/a.png"])
    with pytest.raises(UserError, match="without one"):
        places.locate([name], folder, "x.csv")


def test_a_name_without_suffix_that_means_two_files_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["a.jpg", "a.png", "b.png", "d/a.png"])
    assert places.locate(["a.jpg", "b", "d/a"], folder, "x.csv") == ["a.jpg", "b.png", "d/a.png"]
    with pytest.raises(UserError, match=r"1 with several: a: a\.jpg, a\.png"):
        places.locate(["b", "a"], folder, "x.csv")


@given(st.text(max_size=30))
def test_fuzzed_names_stay_inside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "p"
    if not folder.exists():
        fill(folder, ["ok.png", "d/a.png"])
    try:
        (found,) = places.locate([name], folder, "x.csv")
    except UserError:
        return
    assert Path(os.path.realpath(folder / found)).is_relative_to(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a header"),
        ("image,label\n", "no rows"),
        ("image,label\na.png\n", "1 fields in line 2"),
        ("image,label\na.png,x,y\n", "a header and rows as long"),
        ('image,label\n"a.png,x\n', "a header and rows as long"),
        ("picture,label\na.png,x\n", "--image_column"),
        ("image,class\na.png,x\n", "--label_column"),
        ("image,label\na.png,\n", "none in line 2"),
        ("image,label\na.png,x\nz.png,y\n", "'z.png'"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    fill(tmp_path / "p", ["a.png"])
    with pytest.raises(UserError) as caught:
        sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "classify")
    assert words in str(caught.value)


def test_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"image,label\n\xff\xfe,x\n")
    with pytest.raises(UserError, match="UTF-8"):
        sources.read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text", ["0,0\na,1\nb,0\n", "0,0.1\na,1.0\nb,0.0\n", "﻿0;0.1\r\na;+1\r\nb;0\r\n", "0\t0.1\na\t01\nb\t0"]
)
def test_columns_may_be_called_anything(tmp_path: Path, text: str) -> None:
    """Original 001's columns are literally called 0 and 0.1, its images lack the suffix."""
    fill(tmp_path / "p", ["a.jpg", "b.jpg"])
    one = sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "0", "0.1", "classify")
    assert one.table["file"].tolist() == ["a.jpg", "b.jpg"]
    assert one.table["label"].tolist() == ["1", "0"]
    assert (one.names, one.info["label_type"]) == (("0", "1"), "int")


def test_numbers_sort_as_numbers_and_text_stays_text(tmp_path: Path) -> None:
    fill(tmp_path / "p", [f"{row}.png" for row in range(3)])
    for labels, names in [(("10", "9", "2"), ("2", "9", "10")), (("NA", "null", "nan"), ("NA", "nan", "null"))]:
        text = "image,label\n" + "".join(f"{row}.png, {label} \n" for row, label in enumerate(labels))
        one = sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "classify")
        assert one.names == names
        assert one.table["label"].tolist() == list(labels)


def test_leading_zeros_come_back_in_the_submission(tmp_path: Path) -> None:
    fill(tmp_path / "p", [f"{row}.png" for row in range(3)])

    def labelled(*labels: str) -> sources.Source:
        text = "image,label\n" + "".join(f"{row}.png,{label}\n" for row, label in enumerate(labels))
        return sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "classify")

    one = labelled("002", "010", "001")
    assert (one.names, one.info["spelling"]) == (("1", "2", "10"), {"1": "001", "2": "002", "10": "010"})
    assert sources.fix_classes(one, csv(tmp_path / "c.txt", "010\n002\n001\n")).names == ("10", "2", "1")
    assert "spelling" not in labelled("1.0", "2.0", "+3").info
    with pytest.raises(UserError, match="01, 1"):
        labelled("1", "01", "2")
    for sample, spelled, style in [
        ("image,label\n0.png,000\n", one.info["spelling"], "labels"),  # shows no class of ours: as train
        ("image,label\n0.png,1\n", {}, "labels"),
        ("image,002,001,010\n0.png,0,0,0\n", one.info["spelling"], "probabilities"),
        ("image,2,1,10\n0.png,0,0,0\n", {}, "probabilities"),
    ]:
        path = csv(tmp_path / "s.csv", sample)
        _, info = sources.from_test(tmp_path / "p", path, "image", "label", one, "classify")
        assert (info["spelling"], info["style"]) == (spelled, style)
    two = labelled("01", "02", "10")
    path = csv(tmp_path / "s.csv", "image,label\n0.png,10\n")  # shows no class that needs a zero: as train
    assert sources.from_test(tmp_path / "p", path, "image", "label", two, "classify")[1]["spelling"] == {
        "1": "01",
        "2": "02",
    }
    plain = read(tmp_path, "12")
    _, info = sources.from_test(
        tmp_path / "p", csv(tmp_path / "s.csv", "image,label\n0.png,01\n"), "image", "label", plain, "classify"
    )
    assert info["spelling"] == {"1": "01"}


def test_a_class_in_two_unicode_forms_is_one(tmp_path: Path) -> None:
    decomposed, composed = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    names = [f"{decomposed}/1.png", f"{composed}/2.png", "tea/3.png"]
    both = sources.from_class_folders(fill(tmp_path / "both", names))
    assert both.names == (composed, "tea")
    assert "spelling" not in both.info
    one = sources.from_class_folders(fill(tmp_path / "one", [names[0], names[2]]))
    assert (one.names, one.info["spelling"]) == (both.names, {composed: decomposed})
    fill(tmp_path / "t", ["0.png"])
    for header, spelling, style in [
        (f"image,{composed},tea\n0.png,0,0\n", {}, "probabilities"),
        (f"image,{decomposed},tea\n0.png,0,0\n", {composed: decomposed}, "probabilities"),
        (f"image,label\n0.png,{composed}\n", {}, "labels"),
        ("image,label\n0.png,?\n", {composed: decomposed}, "labels"),  # shows no class of ours: as train
    ]:
        path = csv(tmp_path / "s.csv", header)
        _, info = sources.from_test(tmp_path / "t", path, "image", "label", one, "classify")
        assert (info.get("spelling"), info["style"]) == (spelling, style)
    table = csv(tmp_path / "l.csv", "image,label\n" + "".join(f"{n},{n.partition('/')[0]}\n" for n in names))
    assert sources.from_csv(table, tmp_path / "both", "image", "label", "classify").names == both.names


def test_the_users_own_columns_make_room(tmp_path: Path) -> None:
    fill(tmp_path / "p", ["a.png"])
    text = "image,label,fold,path,user_fold,note,row\na.png,x,7,elsewhere,8,hi,9\n"
    one = sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "classify")
    row = one.table.iloc[0]
    assert (row["user_path"], row["user_user_fold"], row["user_fold"], row["note"]) == ("elsewhere", "7", "8", "hi")
    assert row["user_row"] == "9"  # ours is where a sample stands in the table
    assert not one.table.columns.duplicated().any()


def test_class_order_can_be_fixed(tmp_path: Path) -> None:
    one = sources.from_class_folders(fill(tmp_path / "p", ["b/1.png", "a/deep/er/2.png"]))
    assert one.names == ("a", "b")
    assert sources.fix_classes(one, csv(tmp_path / "c.json", '["b", "a", "c"]')).names == ("b", "a", "c")
    assert sources.fix_classes(one, csv(tmp_path / "c.txt", "b\na\n")).names == ("b", "a")
    for text, words in [("b\n", "unknown: a"), ("a\nb\na\n", "each class once")]:
        with pytest.raises(UserError, match=words):
            sources.fix_classes(one, csv(tmp_path / "c.txt", text))


@pytest.mark.parametrize(("names", "words"), [(["a/1.png", "2.png"], "outside any class folder"), ([], "no images")])
def test_class_folders_that_are_none(tmp_path: Path, names: list[str], words: str) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match=words):
        sources.from_class_folders(fill(tmp_path / "p", names))


def test_points(tmp_path: Path) -> None:
    fill(tmp_path / "p", ["a.png", "b.png"])
    text = "image,n_X,n_Y,left eye_X,left eye_Y,who\na.png,1,2.5,,,me\nb.png,-3,1e2,nan,NaN,you\n"
    one = sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "keypoints")
    assert one.names == ("n", "left eye")
    assert one.info["point_suffixes"] == ["_X", "_Y"]
    assert one.table["n_y"].tolist() == [2.5, 100.0]
    assert one.table["left eye_x"].isna().all()
    assert one.table["who"].tolist() == ["me", "you"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,n_x\na.png,1\n", "only one of the two for n"),
        ("image,label\na.png,1\n", "columns <point>_x"),
        ("image,n_x,n_y\na.png,1,one\n", "one in line 2"),
        ("image,n_x,n_y\na.png,1,inf\n", "inf in line 2"),
        ("image,n_x,n_y\na.png,1,\n", "both x and y"),
    ],
)
def test_wrong_points_are_refused(tmp_path: Path, text: str, words: str) -> None:
    fill(tmp_path / "p", ["a.png"])
    with pytest.raises(UserError) as caught:
        sources.from_csv(csv(tmp_path / "t.csv", text), tmp_path / "p", "image", "label", "keypoints")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,label\na,0\na,0\n", "two rows for a"),
        ("image,label\nz,0\n", "'z'"),
        ("image,label\n", "no rows"),
        ("image\na\n", "only 'image'"),
        ("image,label\n../a,0\n", "lead out of it"),
        ("image,0,2\na,0,0\n", "none for 1"),
    ],
)
def test_wrong_sample_submissions_are_refused(tmp_path: Path, text: str, words: str) -> None:
    fill(tmp_path / "t", ["a.png", "b.png"])
    with pytest.raises(UserError) as caught:
        sources.from_test(
            tmp_path / "t", csv(tmp_path / "s.csv", text), "image", "label", read(tmp_path, "01"), "classify"
        )
    assert words in str(caught.value)


def test_sample_submission_sets_names_order_and_style(tmp_path: Path) -> None:
    fill(tmp_path / "t", ["a.png", "b.png"])
    rows, info = sources.from_test(
        tmp_path / "t",
        csv(tmp_path / "s.csv", "id,0,1\nb,0.5,0.5\na,0,1\n"),
        "image",
        "label",
        read(tmp_path, "01"),
        "classify",
    )
    assert rows.to_dict("list") == {"file": ["b.png", "a.png"], "name": ["b", "a"]}
    assert (info["style"], info["id_style"], info["image_column"]) == ("probabilities", "stem", "id")


@given(st.text(alphabet="image,label\n\"';\t01.png\0 \r#é", max_size=120))
def test_fuzzed_tables_are_read_whole_or_refused(tmp_path: Path, text: str) -> None:
    try:
        table = sources.read_table(csv(tmp_path / "t.csv", "image,label\n" + text))
    except UserError:
        return
    assert list(table.columns) == ["image", "label"]
    assert not table.isna().any(axis=None)
    assert len(table) <= 1 + text.count("\n") + text.count("\r")


@given(
    st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=9)] * 2), max_size=5), st.sampled_from(",;\t")
)
def test_whatever_a_cell_holds_comes_back(tmp_path: Path, rows: list[tuple[str, str]], separator: str) -> None:
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = writers.writer(file, delimiter=separator, quoting=writers.QUOTE_ALL)
        writer.writerows([("image", "label"), *rows])
    assert list(sources.read_table(tmp_path / "t.csv").itertuples(index=False, name=None)) == rows


LANDMARKS = "scorer,me,me,me,me\nbodyparts,nose,nose,tail,tail\ncoords,x,y,x,y\na.png,1,2,3,4\nd/b.png,,,5,6\n"
SAMPLE = "id,0,1\na,0.5,0.5\nd/b,0,1\n"


@given(st.sampled_from([LANDMARKS, SAMPLE]), st.data())
def test_fuzzed_landmarks_and_samples_are_right_or_refused(tmp_path: Path, text: str, data: st.DataObject) -> None:
    """Cut, insert, replace anywhere: every image named exists, every number is a number, or a refusal."""
    folder = tmp_path / "p"
    if not folder.exists():
        fill(folder, ["a.png", "d/b.png"])
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 5)))
    middle = data.draw(st.text(alphabet=',;\t\n\r"0x.-e/\\\0ж ', max_size=4))
    path = csv(tmp_path / "t.csv", text[:start] + middle + text[stop:])
    try:
        if text == LANDMARKS:
            one = sources.from_csv(path, folder, "image", "label", "keypoints")
            files = one.table["file"]
            numbers = one.table[[f"{name}_{axis}" for name in one.names for axis in "xy"]].to_numpy(float)
            assert not np.isinf(numbers).any()
        else:
            rows, _ = sources.from_test(folder, path, "image", "label", read(tmp_path, "01"), "classify")
            files = rows["file"]
            assert rows["name"].is_unique
    except UserError:
        return
    assert all((folder / name).is_file() for name in files)
