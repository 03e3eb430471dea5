"""prepare, as a function on small made-up folders and as a whole command on the digits and the real photos."""

import json
import os
from csv import QUOTE_ALL
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from conftest import House
from octofold.commands import Prepare
from octofold.data import manifest as manifests
from octofold.errors import UserError
from octofold.prepare import preparing
from test_checks import scene
from test_sources import ODD_NAMES, csv


def photos(folder: Path, names: list[str], first: int = 0) -> Path:
    """Different pictures under these names."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(first + number, 32).save(folder / name)
    return folder


def config(tmp_path: Path, **more: object) -> Prepare:
    folds = {} if "folds_file" in more else {"folds": 2}
    return Prepare.model_validate(
        {"competition": "c", "images": tmp_path / "p", "out": tmp_path / "out"} | folds | more
    )


def classes(tmp_path: Path, count: int = 8) -> Path:
    """Class folders a and b with pictures."""
    return photos(tmp_path / "p", [f"{'ab'[row % 2]}/{row}.png" for row in range(count)])


def kinds(prepared: preparing.Prepared) -> dict[str, str]:
    return dict(zip(prepared.problems["file"], prepared.problems["kind"], strict=True))


def test_a_folder_of_classes_becomes_a_manifest(tmp_path: Path) -> None:
    classes(tmp_path)
    prepared = preparing.prepare(config(tmp_path))
    paths = preparing.write(prepared, config(tmp_path))
    again = manifests.read(paths["manifest"])
    assert again.hash == prepared.manifest.hash
    assert again.classes == ("a", "b")
    assert json.loads(paths["classes"].read_text()) == ["a", "b"]
    assert all(path.exists() for path in again.paths)
    assert np.bincount(again.fold).tolist() == [4, 4]
    assert kinds(prepared) == {}


def test_moving_and_renaming_change_no_id_and_no_fold(tmp_path: Path) -> None:
    classes(tmp_path)
    before = preparing.prepare(config(tmp_path)).manifest
    for path in (tmp_path / "p").rglob("*.png"):
        path.rename(path.with_name(f"new {path.name}"))
    (tmp_path / "p").rename(tmp_path / "elsewhere")
    after = preparing.prepare(config(tmp_path, images=tmp_path / "elsewhere")).manifest
    assert set(after.sample_ids) == set(before.sample_ids)
    assert after.hash == before.hash


def test_bad_images_are_left_out_by_name_and_odd_ones_kept(tmp_path: Path) -> None:
    folder = classes(tmp_path)
    scene(50, 32).convert("RGBA").save(folder / "a" / "alpha.png")
    (folder / "a" / "empty.png").touch()
    (folder / "b" / "cut.png").write_bytes((folder / "b" / "1.png").read_bytes()[:200])
    (folder / "b" / "text.jpg").write_text("no image")
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "b" / "other.png").write_bytes((folder / "a" / "2.png").read_bytes())
    prepared = preparing.prepare(config(tmp_path))
    assert kinds(prepared) == {
        "a/alpha.png": "alpha", "a/empty.png": "unreadable", "b/cut.png": "unreadable", "b/text.jpg": "unreadable",
        "a/copy.png": "copy", "b/other.png": "two labels", "a/2.png": "two labels",
    }  # fmt: skip
    kept = set(prepared.manifest.table["path"])
    assert "a/alpha.png" in kept
    assert kept.isdisjoint({"a/empty.png", "b/cut.png", "b/text.jpg", "a/copy.png", "b/other.png", "a/2.png"})
    with pytest.raises(UserError, match="2.png"):
        preparing.prepare(config(tmp_path, conflicts="refuse"))


def test_files_that_nobody_looks_at_are_named(tmp_path: Path) -> None:
    folder, test = classes(tmp_path), photos(tmp_path / "t", ["1.png"], 70)
    for path in (folder / "a" / "x.heic", folder / "b" / "y.jfif", test / "z.HEIC", folder / "a" / "notes.txt"):
        path.write_bytes(b"x")
    os.rename(folder / "b" / "7.png", os.fsencode(folder / "b") + b"/caf\xe9.png")
    told_of_name = "b/caf\\udce9.png"
    found = preparing.prepare(config(tmp_path, test_images=test)).problems
    told = found[found["kind"] == "not looked at"]
    assert list(zip(told["set"], told["file"], strict=True)) == [
        ("train", "a/x.heic"), ("train", told_of_name), ("train", "b/y.jfif"), ("test", "z.HEIC"),
    ]  # fmt: skip


def test_nothing_readable_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        (tmp_path / "p" / name / "x.png").touch()
    with pytest.raises(UserError, match="readable images"):
        preparing.prepare(config(tmp_path))


def test_odd_names_survive_the_whole_way(tmp_path: Path) -> None:
    names = [*ODD_NAMES, "carriage\rreturn.png", " lead.png"]
    photos(tmp_path / "p", names)
    table = pd.DataFrame({"image": names, "label": ["x", "y"] * (len(names) // 2)})
    table.to_csv(tmp_path / "l.csv", index=False, quoting=QUOTE_ALL)
    prepared = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv"))
    again = manifests.read(preparing.write(prepared, config(tmp_path))["manifest"])
    assert sorted(again.table["path"]) == sorted(names)
    assert all(path.is_file() for path in again.paths)


def test_groups_by_column_and_by_near_duplicates(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(12)]
    photos(tmp_path / "p", names)
    for row in range(6):  # near-copies
        scene(row, 32).point(lambda value: min(255, value + 3)).save(tmp_path / "p" / f"{row}n.png")
    rows = [(name, "xy"[row % 2], f"s{row % 4}") for row, name in enumerate(names)]
    rows += [(f"{row}n.png", "xy"[row % 2], f"s{row % 4}") for row in range(6)]
    pd.DataFrame(rows, columns=["image", "label", "session"]).to_csv(tmp_path / "l.csv", index=False)
    by_column = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", group="session")).manifest
    assert by_column.table.groupby("session")["fold"].nunique().max() == 1
    auto = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", group="auto"))
    assert (
        auto.manifest.table.assign(stem=auto.manifest.table["path"].str.strip("n.pg"))
        .groupby("stem")["fold"]
        .nunique()
        .max()
        == 1
    )
    assert auto.summary["groups"] == 12
    assert set(auto.problems["action"]) == {"kept"}
    alone = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", group="none", seed=1)).problems
    assert alone["action"].str.contains("kept, but in folds").any()
    with pytest.raises(UserError, match="--group"):
        preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", group="nosuch"))


def test_a_group_is_the_users_own_column_whatever_ours_are_called(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(12)]
    photos(tmp_path / "p", names)
    table = pd.DataFrame({"image": names, "class": ["x", "y"] * 6})
    own = {name: [f"{name}{row // 3}" for row in range(12)] for name in ("name", "file", "label")}
    table.assign(**own, user_name="other").to_csv(tmp_path / "own.csv", index=False)
    table.to_csv(tmp_path / "l.csv", index=False)
    flags = {"label_column": "class", "twins": False}
    for name, kept in (("name", "user_user_name"), ("file", "user_file"), ("label", "user_label")):
        found = preparing.prepare(config(tmp_path, labels=tmp_path / "own.csv", group=name, **flags)).manifest
        assert found.groups.tolist() == own[name]
        assert found.table.groupby(kept)["fold"].nunique().max() == 1
        with pytest.raises(UserError, match=f"a column '{name}'"):
            preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", group=name, **flags))


def test_a_folds_file_is_honoured_and_checked(tmp_path: Path) -> None:
    names = [f"{row}.png" for row in range(6)]
    photos(tmp_path / "p", names)
    rows = pd.DataFrame({"image": names, "label": ["x", "y"] * 3, "fold": [0, 1, 2, 2, 1, 0], "site": list("aabbcc")})
    rows.drop(columns="fold").to_csv(tmp_path / "l.csv", index=False)
    rows.drop(columns="site").to_csv(tmp_path / "f.csv", index=False)
    flags = {"labels": tmp_path / "l.csv", "folds_file": tmp_path / "f.csv"}
    made = preparing.prepare(config(tmp_path, group="none", **flags)).manifest.table
    assert dict(zip(made["path"], made["fold"], strict=True)) == dict(zip(names, rows["fold"], strict=True))
    with pytest.raises(UserError, match="a, c"):
        preparing.prepare(config(tmp_path, group="site", **flags))
    rows.assign(label="x").to_csv(tmp_path / "f.csv", index=False)
    with pytest.raises(UserError, match="1.png"):
        preparing.prepare(config(tmp_path, group="none", **flags))


def test_folds_are_asked_for_in_one_way(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    given = {"competition": "c", "images": tmp_path / "p"}
    ways: dict[str, object] = {"folds": 3, "holdout": 0.2, "folds_file": tmp_path / "p"}
    for name, value in ways.items():
        preparing.check(Prepare.model_validate(given | {name: value}))
        for other in {*ways} - {name}:
            with pytest.raises(UserError, match=f"--{name}"):
                preparing.check(Prepare.model_validate(given | {name: value, other: ways[other]}))


def test_the_test_set(tmp_path: Path) -> None:
    classes(tmp_path)
    folder = photos(tmp_path / "t", ["x.png", "y.png", "unasked.png"], 70)
    (folder / "twin of x.png").write_bytes((folder / "x.png").read_bytes())
    (folder / "known.png").write_bytes((tmp_path / "p" / "a" / "0.png").read_bytes())
    sample = csv(tmp_path / "s.csv", "image,label\ny.png,a\ntwin of x.png,a\nx.png,a\nknown.png,a\n")
    flags = config(tmp_path, test_images=folder, sample_submission=sample)
    prepared = preparing.prepare(flags)
    test = manifests.read(preparing.write(prepared, flags)["test"])
    assert [json.loads(names) for names in test.table["names"]] == [
        ["y.png"],
        ["twin of x.png", "x.png"],
        ["known.png"],
    ]
    assert not test.is_labelled
    assert test.info["sample_submission"] == "sample_submission.csv"
    assert (tmp_path / "out" / "sample_submission.csv").read_text() == sample.read_text()
    assert kinds(prepared) == {"a/0.png": "copy in test", "x.png": "copy"}
    (folder / "y.png").touch()
    (folder / "y.png").write_bytes(b"")
    with pytest.raises(UserError, match="y.png: an empty file"):
        preparing.prepare(flags)
    assert (
        preparing.prepare(config(tmp_path, test_images=photos(tmp_path / "u", ["1.png"]))).summary["test_samples"] == 1
    )


def test_keypoints(tmp_path: Path) -> None:
    photos(tmp_path / "p", ["a.png", "b.png", "c.png"])
    labels = csv(tmp_path / "l.csv", "image,n_x,n_y,e_x,e_y\na.png,1,2,,\nb.png,3,4,5,6\nc.png,0,0,1.5,1\n")
    prepared = preparing.prepare(config(tmp_path, labels=labels, task="keypoints"))
    again = manifests.read(preparing.write(prepared, config(tmp_path))["manifest"])
    assert again.classes == ("n", "e")
    assert again.target.shape == (3, 2, 2)
    assert np.isnan(again.target[0, 1]).all()
    assert again.target[1].tolist() == [[3, 4], [5, 6]]
    assert not len(prepared.problems)


def test_points_outside_their_picture_are_listed(tmp_path: Path) -> None:
    photos(tmp_path / "p", ["a.png", "b.png", "c.png"])  # of 32 px
    labels = csv(tmp_path / "l.csv", "image,n_x,n_y,e_x,e_y\na.png,500,2,,\nb.png,-0.5,32,5,6\nc.png,9,9,5,-7.5\n")
    problems = preparing.prepare(config(tmp_path, labels=labels, task="keypoints")).problems
    told = dict(zip(problems["file"], problems["detail"], strict=True))
    assert told == {"a.png": "n (500, 2) of 32 x 32 px", "c.png": "e (5, -7.5) of 32 x 32 px"}
    assert set(problems["kind"]) == {"points outside"}


def test_a_test_manifest_left_by_an_earlier_call_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes(tmp_path)
    flags = config(tmp_path, test_images=photos(tmp_path / "t", ["1.png"], 70))
    for now, count in ((flags, 0), (flags, 0), (config(tmp_path), 1)):
        with caplog.at_level("WARNING", "octofold"):
            preparing.write(preparing.prepare(now), now)
        assert caplog.text.count("test.csv is an earlier prepare's") == count


@pytest.mark.slow
def test_command_on_digits(house: House) -> None:
    result = house.run("prepare", "--competition", "digits", "--builtin", "digits").result
    train, test = manifests.read(result["manifest"]), manifests.read(result["test"])
    assert (len(train.table), len(test.table)) == (1437, 360)
    assert train.classes == tuple("0123456789")
    truth = pd.read_csv(house.home / "data" / "digits" / "test_truth.csv")
    sample = pd.read_csv(house.home / "data" / "digits" / "sample_submission.csv")
    assert truth["image"].tolist() == sample["image"].tolist()
    assert set(train.sample_ids).isdisjoint(test.sample_ids)
    assert result["manifest_hash"] == train.hash
    pictures = {path.name for path in (house.home / "mlruns").rglob("*.png")}
    assert {"counts.png", "looks.png", "classes-0.png", "worst.png", "groups.png"} <= pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--competition", "c"], "--images FOLDER"),
        (["--competition", "c", "--images", "nowhere"], "nowhere"),
        (["--competition", "../c", "--builtin", "digits"], "competition"),
        (
            ["--competition", "c", "--images", ".", "--labels", "l", "--task", "keypoints", "--test_points", "t"],
            "--test_im",
        ),
        (
            ["--competition", "c", "--images", ".", "--labels", "l", "--task", "keypoints", "--classes", "t"],
            "--classes",
        ),
    ],
)
def test_commands_that_cannot_work(house: House, refuses: object, flags: list[str], words: str) -> None:
    refuses(house.run("prepare", *flags), words)  # type: ignore[operator]
    assert not (house.home / "data").exists()


@pytest.mark.real
@pytest.mark.slow
def test_command_on_real_photos(house: House, grocery15: Path) -> None:
    result = house.run(
        "prepare", "--competition", "grocery15", "--images", grocery15 / "train", "--labels", grocery15 / "train.csv",
        "--test_images", grocery15 / "test", "--sample_submission", grocery15 / "sample_submission.csv",
        "--group", "product", "--folds", 3, "--twins", "false",
    ).result  # fmt: skip
    train, test = manifests.read(result["manifest"]), manifests.read(result["test"])
    assert (len(train.table), len(test.table), len(train.classes)) == (1407, 1226, 15)
    assert train.table.groupby("product")["fold"].nunique().max() == 1
    assert [json.loads(names)[0] for names in test.table["names"]][:2] == ["test_00000.jpg", "test_00001.jpg"]


@pytest.mark.real
def test_a_mirrored_photo_is_found_by_its_embedding_and_kept_in_one_fold(tmp_path: Path, grocery15: Path) -> None:
    table = pd.read_csv(grocery15 / "train.csv").iloc[::60].head(20)
    (tmp_path / "p").mkdir()
    rows = []
    for name, label in zip(table["image"], table["label"], strict=True):
        photo = Image.open(grocery15 / "train" / name)
        for prefix, picture in (("", photo), ("m", ImageOps.mirror(photo))):
            picture.save(tmp_path / "p" / f"{prefix}{Path(name).name}", quality=90)
            rows.append((f"{prefix}{Path(name).name}", label))
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "l.csv", index=False)
    found = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", folds=2))
    twins = found.problems[found.problems["kind"] == "near-duplicate (embedding)"]
    assert len(twins) >= 18
    assert set(twins["action"]) == {"kept"}
    assert len(found.twins) >= len(twins)
    for file, detail in zip(twins["file"], twins["detail"], strict=True):
        assert {file.removeprefix("m"), "m" + file.removeprefix("m")} == {file, detail.split(" to ")[1]}
    preparing.write(found, config(tmp_path, labels=tmp_path / "l.csv", folds=2))
    kept = config(tmp_path, labels=tmp_path / "l.csv", folds=2, previous=tmp_path / "out" / "manifest.csv")
    assert preparing.prepare(kept).manifest.hash == found.manifest.hash
    off = preparing.prepare(config(tmp_path, labels=tmp_path / "l.csv", folds=2, twins=False))
    assert not off.problems["kind"].str.contains("embedding").any()


@pytest.mark.real
def test_new_twins_stay_together_when_test_images_come_later(tmp_path: Path, grocery15: Path) -> None:
    """No cut was ever chosen, so the embedding's pairs are all there is to keep mirrored photos in one fold."""
    table = pd.read_csv(grocery15 / "train.csv").iloc[::60].head(20)
    rows = []

    def add(name: str, label: str, picture: Image.Image) -> None:
        (tmp_path / "p").mkdir(exist_ok=True)
        picture.save(tmp_path / "p" / name, quality=90)
        rows.append((name, label))
        pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "l.csv", index=False)

    for number, (name, label) in enumerate(zip(table["image"], table["label"], strict=True)):
        photo = Image.open(grocery15 / "train" / name)
        if number == 10:
            flags = config(tmp_path, labels=tmp_path / "l.csv")
            preparing.write(preparing.prepare(flags), flags)
        add(f"{number}.jpg", label, photo)
        if number >= 10:
            add(f"{number}m.jpg", label, ImageOps.mirror(photo))
    (tmp_path / "t").mkdir()
    for name in pd.read_csv(grocery15 / "train.csv")["image"].iloc[30::300]:
        Image.open(grocery15 / "train" / name).save(tmp_path / "t" / Path(name).name)
    flags = config(tmp_path, labels=tmp_path / "l.csv", test_images=tmp_path / "t",
                   previous=tmp_path / "out" / "manifest.csv")  # fmt: skip
    made = preparing.prepare(flags).manifest.table.set_index("path")
    together = [made.loc[f"{row}.jpg", "group"] == made.loc[f"{row}m.jpg", "group"] != "" for row in range(10, 20)]
    assert sum(together) >= 9, together


@pytest.mark.real
def test_real_keypoints(tmp_path: Path, mousekp: Path) -> None:
    flags = config(tmp_path, images=mousekp / "train", labels=mousekp / "train.csv", task="keypoints", folds=5)
    manifest = preparing.prepare(flags).manifest
    assert manifest.target.shape == (70, 17, 2)
    assert 0 < np.isnan(manifest.target).mean() < 0.5
    assert (manifest.table["width"].iat[0], manifest.table["height"].iat[0]) == (396, 406)
