"""A new version of a manifest: decisions replayed on raw data, old folds kept, re-encoded images recognised."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from octofold.commands import Prepare
from octofold.data import manifest as manifests
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.prepare import lineage, preparing
from octofold.prepare.lineage import Fingerprints
from test_checks import scene


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 pictures in two class folders."""
    for row in range(24):
        folder = tmp_path / "p" / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        scene(row, 48).save(folder / f"{row}.png")
    return tmp_path


def run(home: Path, **flags: object) -> tuple[preparing.Prepared, dict[str, Path]]:
    folds = {} if {"holdout", "folds_file"} & {*flags} else {"folds": 3}
    config = Prepare.model_validate({"competition": "c", "images": home / "p", "out": home / "out"} | folds | flags)
    made = preparing.prepare(config)
    return made, preparing.write(made, config)


def folds_of(manifest: Manifest) -> dict[str, int]:
    return dict(zip(manifest.sample_ids.tolist(), manifest.fold.tolist(), strict=True))


def decide(home: Path, manifest: Manifest, acts: dict[str, tuple[str, str]]) -> Path:
    """Write a journal: file name to (action, target)."""
    journal = Journal(home / "decisions.jsonl")
    for name, (action, target) in acts.items():
        row = manifest.table.set_index("path").loc[name]
        before = journal.standing(str(row["sample_id"]))
        entry = Entry(str(row["sample_id"]), action, label=str(row["label"]), target=target,
                      after=before.entry if before else "", manifest_hash=manifest.hash)  # fmt: skip
        assert not journal.append([entry])[1]
    return journal.path


def test_decisions_make_a_new_version_and_raw_data_stays(photos: Path) -> None:
    first, _ = run(photos)
    raw = {path: path.read_bytes() for path in (photos / "p").rglob("*.png")}
    journal = decide(
        photos, first.manifest, {"a/0.png": ("relabel", "b"), "b/1.png": ("drop", ""), "a/2.png": ("keep", "")}
    )
    second, paths = run(photos, decisions=journal)
    table = second.manifest.table.set_index("path")
    assert table.loc["a/0.png", "label"] == "b"
    assert "b/1.png" not in table.index
    assert {path: path.read_bytes() for path in raw} == raw
    old, new = folds_of(first.manifest), folds_of(second.manifest)
    assert all(old[name] == fold for name, fold in new.items())
    assert second.changes is not None
    assert sorted(second.changes["change"]) == ["gone", "relabelled"]
    assert manifests.read(paths["replaced"]).hash == first.manifest.hash
    assert second.summary["decisions"] == {"relabel applied": 1, "drop applied": 1, "keep confirmed": 1}


def test_a_manifest_is_not_followed_without_the_decisions_that_made_it(photos: Path) -> None:
    first, _ = run(photos)
    manifest = photos / "out" / "manifest.csv"
    journal = decide(photos, first.manifest, {"a/2.png": ("keep", "")})
    run(photos, decisions=journal)
    run(photos, previous=manifest)  # nothing to lose
    journal = decide(photos, first.manifest, {"a/0.png": ("relabel", "b"), "b/1.png": ("drop", "")})
    run(photos, decisions=journal)
    with pytest.raises(UserError, match=r"(?s)2 of them changed.*--decisions .*decisions.jsonl"):
        run(photos, previous=manifest)
    assert "b/1.png" not in set(run(photos, previous=manifest, decisions=journal)[0].manifest.table["path"])
    (photos / "none.jsonl").touch()
    back, _ = run(photos, previous=manifest, decisions=photos / "none.jsonl")
    assert back.manifest.hash == first.manifest.hash
    run(photos, previous=manifest)


def test_twice_is_once(photos: Path) -> None:
    first, _ = run(photos)
    journal = decide(photos, first.manifest, {"a/0.png": ("relabel", "b"), "b/1.png": ("drop", "")})
    second, _ = run(photos, decisions=journal)
    third, paths = run(photos, decisions=journal)
    assert third.manifest.hash == second.manifest.hash
    assert third.changes is not None
    assert third.changes.empty
    assert "replaced" not in paths


def test_an_undone_drop_comes_back(photos: Path) -> None:
    first, _ = run(photos)
    path = decide(photos, first.manifest, {"a/0.png": ("drop", "")})
    run(photos, decisions=path)
    journal = Journal(path)
    drop = journal.entries[0]
    journal.append([Entry(drop.sample_id, "undo", undoes=drop.entry)])
    run(photos, decisions=path)
    last, _ = run(photos, decisions=path)
    assert last.manifest.hash == first.manifest.hash


def test_new_images_find_a_fold_and_old_ones_keep_theirs(photos: Path) -> None:
    first, paths = run(photos)
    with pytest.raises(UserError, match="--holdout 0.2"):
        run(photos, previous=paths["manifest"], holdout=0.2)
    for row in range(30, 42):
        scene(row, 48).save(photos / "p" / "ab"[row % 2] / f"{row}.png")
    scene(5, 48).point(lambda value: min(255, value + 3)).save(photos / "p" / "b" / "like 5.png")
    second, _ = run(photos, previous=paths["manifest"])
    old, new = folds_of(first.manifest), folds_of(second.manifest)
    assert all(new[name] == fold for name, fold in old.items())
    assert len(new) == len(old) + 13
    table = second.manifest.table.set_index("path")
    assert table.loc["b/like 5.png", "fold"] == table.loc["b/5.png", "fold"]
    fresh = table[table.index.str.contains("3.[.]png|4.[.]png", regex=True)]
    assert np.ptp(np.bincount(second.manifest.fold, minlength=3)) <= 3
    assert fresh["fold"].nunique() == 3


def test_a_users_fold_numbers_stay_when_images_are_added(photos: Path) -> None:
    names = sorted(path.name for path in (photos / "p").rglob("*.png"))
    rows = "".join(f"{'ab'[int(name[:-4]) % 2]}/{name},{row % 3 + 1}\n" for row, name in enumerate(names))
    (photos / "f.csv").write_text("image,fold\n" + rows)
    first, paths = run(photos, folds_file=photos / "f.csv")
    assert first.manifest.folds == [1, 2, 3]
    for row in range(30, 42):
        scene(row, 48).save(photos / "p" / "ab"[row % 2] / f"{row}.png")
    second, _ = run(photos, previous=paths["manifest"])
    old, new = folds_of(first.manifest), folds_of(second.manifest)
    assert all(new[name] == fold for name, fold in old.items())
    assert np.bincount(second.manifest.fold).tolist() == [0, 12, 12, 12]


def test_new_images_leave_the_held_out_share_as_it_was(photos: Path) -> None:
    first, paths = run(photos, holdout=0.25)
    for row in range(30, 54):
        scene(row, 48).save(photos / "p" / "ab"[row % 2] / f"{row}.png")
    with pytest.raises(UserError, match="the 2 folds of"):
        run(photos, previous=paths["manifest"])  # --folds 3
    second, _ = run(photos, previous=paths["manifest"], folds=2)
    old, new = folds_of(first.manifest), folds_of(second.manifest)
    assert all(new[name] == fold for name, fold in old.items())
    assert np.bincount(first.manifest.fold).tolist() == [6, 18]
    assert np.bincount(second.manifest.fold).tolist() == [12, 36]
    drawn = second.manifest.table.groupby("label")["fold"].apply(lambda fold: int((fold == 0).sum()))
    assert drawn.tolist() == [6, 6]


def test_re_encoded_images_keep_fold_and_decision(photos: Path) -> None:
    first, _ = run(photos)
    journal = decide(photos, first.manifest, {"a/0.png": ("relabel", "b"), "a/4.png": ("drop", "")})
    for name in ("a/0.png", "a/4.png", "b/7.png"):
        with Image.open(photos / "p" / name) as image:
            image.convert("RGB").save(photos / "p" / name.replace(".png", ".jpg"), quality=90)
        (photos / "p" / name).unlink()
    second, _ = run(photos, decisions=journal)
    table, before = second.manifest.table.set_index("path"), first.manifest.table.set_index("path")
    assert table.loc["a/0.jpg", "label"] == "b"
    assert "a/4.jpg" not in table.index
    for name in ("a/0", "b/7"):
        assert table.loc[f"{name}.jpg", "fold"] == before.loc[f"{name}.png", "fold"]
    said = second.problems[second.problems["kind"] == "re-encoded"]
    assert set(said["file"]) == {"a/0.jpg", "a/4.jpg", "b/7.jpg"}
    assert second.changes is not None
    assert set(second.changes["change"]) == {"re-encoded", "relabelled", "gone"}
    third, _ = run(photos, decisions=journal)  # the manifest before knows the new bytes only
    assert third.manifest.hash == second.manifest.hash
    assert "re-encoded" not in set(third.problems["kind"])
    with Image.open(photos / "p" / "a" / "0.jpg") as image:
        image.convert("RGB").save(photos / "p" / "a" / "0.webp", quality=95)
    (photos / "p" / "a" / "0.jpg").unlink()
    table = run(photos, decisions=journal)[0].manifest.table.set_index("path")
    assert table.loc["a/0.webp", "label"] == "b"
    assert table.loc["a/0.webp", "fold"] == before.loc["a/0.png", "fold"]
    assert "a/4.jpg" not in table.index


def test_a_dropped_image_stays_dropped_when_the_one_it_looks_like_is_removed(photos: Path) -> None:
    scene(0, 48).point(lambda value: min(255, value + 3)).save(photos / "p" / "a" / "like 0.png")
    first, _ = run(photos)
    acts = {"a/like 0.png": ("drop", ""), "a/0.png": ("keep", "")}
    run(photos, decisions=decide(photos, first.manifest, acts))
    (photos / "p" / "a" / "0.png").unlink()
    for _ in range(2):
        assert "a/like 0.png" not in set(run(photos, decisions=photos / "decisions.jsonl")[0].manifest.table["path"])
    (photos / "none.jsonl").touch()
    again, _ = run(photos, decisions=photos / "none.jsonl")  # without its decision it is new, not re-encoded
    assert "re-encoded" not in set(again.problems["kind"])


def test_a_decision_settles_an_image_under_two_labels(photos: Path) -> None:
    twin = photos / "p" / "b" / "twin of 0.png"
    first, _ = run(photos)
    twin.write_bytes((photos / "p" / "a" / "0.png").read_bytes())
    journal = decide(photos, first.manifest, {"a/0.png": ("relabel", "b")})
    assert "a/0.png" not in set(run(photos, previous=photos / "out" / "manifest.csv")[0].manifest.table["path"])
    table = run(photos, decisions=journal)[0].manifest.table.set_index("path")
    assert table.loc["a/0.png", "label"] == "b"
    journal = decide(photos, manifests.read(photos / "out" / "manifest.csv"), {"a/0.png": ("keep", "")})
    table = run(photos, decisions=journal)[0].manifest.table.set_index("path")
    assert table.loc["a/0.png", "label"] == "b", "confirmed by a second look"
    with pytest.raises(UserError, match="--decisions as well: 1 of them changed"):
        run(photos, previous=photos / "out" / "manifest.csv")
    twin.unlink()
    assert run(photos, decisions=journal)[0].manifest.table.set_index("path").loc["a/0.png", "label"] == "b"
    with pytest.raises(UserError, match="--decisions as well: 1 of them changed"):
        run(photos, previous=photos / "out" / "manifest.csv")


def test_damaged_lines_of_the_journal_are_told(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = run(photos)
    journal = decide(photos, first.manifest, {"a/0.png": ("relabel", "b")})
    journal.write_text("\nsomething else\n" + journal.read_text() + '{"sample_id": "0')
    with caplog.at_level("WARNING", "octofold"):
        second, paths = run(photos, decisions=journal)
    assert "1 relabel applied, 2 damaged lines left out (line 2: cut short or not JSON" in caplog.text
    assert "line 4: " in caplog.text
    told = second.problems[second.problems["kind"] == "damaged line"]
    assert told["detail"].str.slice(0, 7).tolist() == ["line 2:", "line 4:"]
    assert set(told["file"]) == {"decisions.jsonl"}
    assert json.loads(paths["report"].read_text())["problems"]["journal: damaged line"] == 2


def test_a_file_that_is_no_journal_is_refused_before_anything_is_done(photos: Path) -> None:
    (photos / "labels.csv").write_text("image,label\n0.png,a\n")
    config = Prepare(competition="c", images=photos / "p", decisions=photos / "labels.csv")
    with pytest.raises(UserError, match="no entry in it"):
        preparing.check(config)


def test_a_kept_label_settles_an_image_under_two_labels(photos: Path) -> None:
    first, _ = run(photos)
    journal = decide(photos, first.manifest, {"a/0.png": ("keep", "")})
    twin = photos / "p" / "b" / "twin of 0.png"
    twin.write_bytes((photos / "p" / "a" / "0.png").read_bytes())
    made, _ = run(photos, decisions=journal)
    assert made.manifest.table.set_index("path").loc["a/0.png", "label"] == "a"
    assert made.decided is not None
    assert made.decided["outcome"].tolist() == ["confirmed"]
    (photos / "p" / "c").mkdir()
    (photos / "p" / "a" / "0.png").rename(photos / "p" / "c" / "0.png")  # b or c: nobody says a any more
    table = run(photos, decisions=journal)[0].manifest.table
    assert first.manifest.table.set_index("path").loc["a/0.png", "sample_id"] not in set(table["sample_id"])


def test_dropping_everything_is_refused_and_leaves_the_manifest(photos: Path) -> None:
    first, paths = run(photos)
    journal = decide(photos, first.manifest, {name: ("drop", "") for name in first.manifest.table["path"]})
    with pytest.raises(UserError, match="every one dropped"):
        run(photos, decisions=journal)
    assert manifests.read(paths["manifest"]).hash == first.manifest.hash


def test_a_manifest_cut_between_its_two_files_is_no_dead_end(photos: Path) -> None:
    first, paths = run(photos)
    table = paths["manifest"].read_bytes()
    journal = decide(photos, first.manifest, {"a/0.png": ("drop", ""), "b/1.png": ("relabel", "a")})
    second, _ = run(photos, decisions=journal)
    paths["manifest"].write_bytes(table)  # the new description beside the old table
    third, _ = run(photos, decisions=journal)
    assert third.manifest.hash == second.manifest.hash
    assert third.changes is not None
    assert sorted(third.changes["change"]) == ["gone", "relabelled"]


def test_same_looks_is_one_to_one(tmp_path: Path) -> None:
    tiny = np.full((4, 12), 100, np.uint8)
    tiny[1] += 1
    old = Fingerprints(np.array(["a", "b"]), np.zeros(2, np.uint64), tiny[:2])
    old.save(tmp_path)
    new = Fingerprints(np.array(["x", "y"]), np.zeros(2, np.uint64), tiny[[1, 0]])
    assert lineage.same_looks(["a", "b"], new, tmp_path) == {"a": "y", "b": "x"}
    assert lineage.same_looks(["a"], new, tmp_path) == {"a": "y"}
    assert lineage.same_looks(["never seen"], new, tmp_path) == {}
    assert lineage.same_looks(["a"], new, tmp_path / "nothing here") == {}


def test_fingerprints_remember_what_is_gone(tmp_path: Path) -> None:
    for name in "abc":
        Fingerprints(np.array([name]), np.array([ord(name)], np.uint64), np.zeros((1, 3), np.uint8)).save(tmp_path)
    assert sorted(lineage.read(tmp_path).ids.tolist()) == ["a", "b", "c"]
    (tmp_path / lineage.FILE).write_bytes(b"no such file")
    with pytest.raises(UserError, match="fingerprints"):
        lineage.read(tmp_path)


def test_a_manifest_edited_by_hand_is_not_taken_as_the_one_before(photos: Path) -> None:
    first, paths = run(photos)
    paths["manifest"].write_text(paths["manifest"].read_text().replace(",a,", ",b,", 1))
    journal = decide(photos, first.manifest, {"a/0.png": ("drop", "")})
    with pytest.raises(UserError, match="never by hand"):
        run(photos, decisions=journal)
    assert json.loads((photos / "out" / "manifest.json").read_text())["hash"] == first.manifest.hash
