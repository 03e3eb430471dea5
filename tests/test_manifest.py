"""The manifest survives the disk, its hash means what training sees, and a hand-edited one is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.data import manifest as manifests
from octofold.data.manifest import Manifest
from octofold.errors import UserError


def make(folder: Path = Path("/photos")) -> Manifest:
    """Six samples, names that need quoting."""
    table = pd.DataFrame(
        {
            "sample_id": [f"{row:016x}" for row in range(6)],
            "path": ["a b.png", 'ж,"ё".png', "🍏.png", "d/e.png", "NA", "nan.png"],
            "label": ["NA", "null", "007", "NA", "null", "007"],
            "group": ["", "g", "g", "1", "01", ""],
            "fold": [0, 1, 1, 0, 1, 0],
            "product": ["x", "", "NaN", "1e5", "y", "z"],
        }
    )
    return Manifest(table, "classify", ("007", "null", "NA"), "c", folder)


def make_points() -> Manifest:
    table = pd.DataFrame({"sample_id": ["a", "b"], "path": ["a.png", "b.png"], "n_x": [1.25, np.nan],
                          "n_y": [0.1 + 0.2, np.nan], "group": ["", ""], "fold": [0, 1]})  # fmt: skip
    return Manifest(table, "keypoints", ("n",), "c", Path("/photos"))


def test_round_trip(tmp_path: Path) -> None:
    for one in (make(), make_points()):
        again = manifests.read(one.save(tmp_path / "manifest.csv"))
        assert again.hash == one.hash
        assert again.classes == one.classes
        assert again.paths == one.paths
        assert again.groups.tolist() == one.groups.tolist()
        assert np.array_equal(again.target, one.target, equal_nan=one.task == "keypoints")
        assert again.table.astype(str).equals(one.table.astype(str))


def test_a_table_that_cannot_be_written_leaves_both_files_as_they_were(tmp_path: Path) -> None:
    made = make()
    path = made.save(tmp_path / "m.csv")
    before = [path.read_bytes(), path.with_suffix(".json").read_bytes()]
    odd = replace(made, table=made.table.assign(note=pd.Series(["\udce9"] * 6, dtype=object)), info={"new": 1})
    with pytest.raises(UnicodeEncodeError):
        odd.save(path)
    assert [path.read_bytes(), path.with_suffix(".json").read_bytes()] == before


def test_images_beside_the_manifest_move_with_it(tmp_path: Path) -> None:
    one = make(tmp_path / "old" / "images")
    (tmp_path / "old").mkdir()
    one.save(tmp_path / "old" / "manifest.csv")
    (tmp_path / "old").rename(tmp_path / "new")
    assert manifests.read(tmp_path / "new" / "manifest.csv").images == (tmp_path / "new" / "images").resolve()


def test_hash_sees_what_training_sees_and_nothing_else() -> None:
    one = make()
    shuffled = one.take(np.array([3, 1, 5, 0, 2, 4]))
    assert shuffled.hash == one.hash
    other = {
        "path": lambda table: table.assign(path=table["path"] + "x"),
        "product": lambda table: table.drop(columns="product"),
    }
    for change in other.values():
        assert Manifest(change(one.table), one.task, one.classes, "d", Path("/other")).hash == one.hash
    for name, value in (("label", "null"), ("fold", 7), ("group", "new"), ("sample_id", "f" * 16)):
        table = one.table.copy()
        table.loc[0, name] = value
        assert Manifest(table, one.task, one.classes, "c", one.images).hash != one.hash, name
    assert Manifest(one.table, one.task, one.classes[::-1], "c", one.images).hash != one.hash


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace("007", "NA", 1), "run prepare again"),
        (lambda text: text.replace(",007,", ",other,", 1), "got:      other"),
        (lambda text: text.replace("0000000000000001", "0000000000000000"), "repeated: 0000000000000000"),
        (lambda text: text.replace("path", "paht"), "no path"),
        (lambda text: text.replace(",g,1", ",g,one", 1), "whole fold numbers"),
        (lambda text: "", "a CSV that prepare wrote"),
        (lambda text: text.replace("d/e.png", "d/../../e.png"), "'d/../../e.png'"),
        (lambda text: text.replace("d/e.png", "/etc/passwd"), "'/etc/passwd'"),
        (lambda text: text.replace("sample_id", '"sample_id'), "no sample_id"),
        (lambda text: text + "x,y,z,1,2,3,4,5,6\n", "a CSV that prepare wrote"),
    ],
)
def test_a_spoiled_manifest_is_refused(tmp_path: Path, spoil: object, words: str) -> None:
    path = make().save(tmp_path / "manifest.csv")
    path.write_text(spoil(path.read_text()))  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        manifests.read(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"task": "classify"}', '{"task": 1, "classes": 2}', "\x00"])
def test_a_spoiled_description_is_refused(tmp_path: Path, text: str) -> None:
    path = make().save(tmp_path / "manifest.csv")
    path.with_suffix(".json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        manifests.read(path)


@given(st.data())
def test_fuzz_never_a_traceback_never_a_silent_change(tmp_path: Path, data: st.DataObject) -> None:
    """Cut, insert, replace anywhere in the CSV or its description: the same manifest, or a refusal."""
    one = data.draw(st.sampled_from([make(), make_points()]))
    path = one.save(tmp_path / "manifest.csv")
    target = data.draw(st.sampled_from([path, path.with_suffix(".json")]))
    raw = target.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 6)))
    target.write_bytes(raw[:start] + data.draw(st.binary(max_size=4)) + raw[stop:])
    try:
        again = manifests.read(path)
    except UserError:
        return
    header_intact = target == path
    assert again.hash == one.hash or not header_intact
    assert len(again.target) == len(again.table)


def test_check_folds() -> None:
    assert manifests.check_folds(make(), None) == [0, 1]
    with pytest.raises(UserError, match="fold numbers"):
        manifests.check_folds(make(), [0, 5])
    with pytest.raises(UserError, match="leave it out for all"):
        manifests.check_folds(make(), [])
