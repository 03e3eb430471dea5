"""The queue: suspicious labels first, reasons in words, nothing lost when images, models or manifests move on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import House
from labelled import CLASSES, make_embeddings, make_manifest, make_oof
from octofold.clean import cleaning
from octofold.clean.evidence import KINDS
from octofold.clean.vectors import embed
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.predictions import Predictions

WRONG = {4: 2, 9: 1, 20: 0}


def ids_of(manifest: Manifest, rows: object) -> set[str]:
    return set(manifest.sample_ids[list(rows)].tolist())  # type: ignore[call-overload]


def test_wrong_labels_come_first_with_reasons(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    oof = [make_oof(manifest, truth, seed) for seed in (0, 1)]
    queue = cleaning.rank(manifest, oof, make_embeddings(manifest, truth))
    assert {item.sample_id for item in queue.items[:3]} == ids_of(manifest, WRONG)
    assert queue.flagged >= 3
    for item in queue.items[:3]:
        row = manifest.sample_ids.tolist().index(item.sample_id)
        assert item.guesses[0][0] == CLASSES[truth[row]], "the first guess is what the image shows"
        assert {"model", "neighbours"} <= set(item.kinds) <= set(KINDS)
        assert any(CLASSES[truth[row]] in text for text in item.reasons)
    assert sorted(item.sample_id for item in queue.items) == sorted(manifest.sample_ids), "each sample once"
    assert any("confident learning counts" in note for note in queue.notes)


@pytest.mark.parametrize("with_oof", [True, False])
@pytest.mark.parametrize("with_vectors", [True, False])
def test_each_source_alone_and_none(tmp_path: Path, with_oof: bool, with_vectors: bool) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    queue = cleaning.rank(
        manifest, [make_oof(manifest, truth)] * with_oof, make_embeddings(manifest, truth) if with_vectors else None
    )
    first = {item.sample_id for item in queue.items[:3]}
    assert (first == ids_of(manifest, WRONG)) == (with_oof or with_vectors)
    assert len(queue.items) == len(manifest.table)
    assert any("none yet" in note for note in queue.notes) == (not with_oof)


def test_rows_are_found_by_id_whatever_their_order(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    oof, vectors = make_oof(manifest, truth), make_embeddings(manifest, truth)
    shuffle = np.random.default_rng(0).permutation(len(truth))
    mixed = oof.take(manifest.sample_ids[shuffle].tolist()).reorder(CLASSES[::-1])
    other = cleaning.rank(manifest, [mixed], type(vectors)(vectors.sample_ids[shuffle], vectors.values[shuffle]))
    assert other.items == cleaning.rank(manifest, [oof], vectors).items


def test_folds_in_separate_files_and_folds_not_trained_yet(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    whole = make_oof(manifest, truth)
    parts = [whole.take(manifest.sample_ids[manifest.fold == fold].tolist()) for fold in manifest.folds]
    assert cleaning.rank(manifest, parts).items == cleaning.rank(manifest, [whole]).items
    queue = cleaning.rank(manifest, parts[:2])
    assert any("have no out-of-fold prediction yet" in note for note in queue.notes)
    silent = ids_of(manifest, np.flatnonzero(manifest.fold >= 2))
    assert not any(item.flagged for item in queue.items if item.sample_id in silent)


def test_a_manifest_that_moved_on(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    oof = make_oof(manifest, truth)
    table = manifest.table.drop(index=[0, 1]).reset_index(drop=True)
    newer = dataclasses.replace(manifest, table=table, classes=(*CLASSES, "plum"))
    queue = cleaning.rank(newer, [oof], make_embeddings(manifest, truth))
    assert len(queue.items) == len(table)
    assert any("40 samples are in both, 2 are gone" in note for note in queue.notes)


def test_a_decision_on_a_label_that_changed_comes_back(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path)
    quiet, loud = manifest.sample_ids[:2].tolist()
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([Entry(quiet, "keep", label=CLASSES[0]), Entry(loud, "keep", label="what it was called once")])
    assert quiet not in cleaning.undecided(journal, manifest)
    assert loud in cleaning.undecided(journal, manifest)
    queue = cleaning.rank(manifest, [make_oof(manifest, truth)], journal=journal)
    assert queue.items[0].sample_id == loud
    assert queue.items[0].kinds[0] == "stale"
    assert "what it was called once" in queue.items[0].reasons[0]


def test_a_relabel_confirmed_is_decided_on_the_raw_labels_too(tmp_path: Path) -> None:
    manifest, _ = make_manifest(tmp_path)
    one = manifest.sample_ids[0]
    journal = Journal(tmp_path / "j.jsonl")
    relabel = Entry(one, "relabel", label=CLASSES[0], target=CLASSES[1])
    journal.append([relabel])
    journal.append([Entry(one, "keep", label=CLASSES[1], after=relabel.entry)])
    assert one not in cleaning.undecided(journal, manifest)
    relabelled = manifest.table.assign(label=[CLASSES[1], *manifest.table["label"][1:]])
    assert one not in cleaning.undecided(journal, dataclasses.replace(manifest, table=relabelled))


def test_keypoints_far_from_where_the_models_see_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(10, 90, (25, 2, 2))
    given = points.copy()
    given[7, 1] += 60
    given[8, 0] = np.nan
    columns = {f"{name}_{axis}": given[:, n, a] for n, name in enumerate("ab") for a, axis in enumerate("xy")}
    table = pd.DataFrame({"sample_id": [f"s{row}" for row in range(25)], "path": "x.png", **columns}).assign(fold=0)
    manifest = Manifest(table, "keypoints", ("a", "b"), "mouse", tmp_path)
    guess = (points + rng.normal(0, 1, points.shape)).astype(np.float32)
    oof = Predictions(manifest.sample_ids, guess, ("a", "b"), manifest.hash, "net", "0", "none", manifest.fold)
    queue = cleaning.rank(manifest, [oof])
    assert queue.items[0].sample_id == "s7"
    assert "b is " in queue.items[0].reasons[0]
    assert queue.flagged == 1
    np.testing.assert_allclose(queue.guessed_points["s7"], guess[7])


def test_refusals(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path)
    oof = make_oof(manifest, truth)
    with pytest.raises(UserError, match="out-of-fold"):
        cleaning.rank(manifest, [dataclasses.replace(oof, fold=None)])
    with pytest.raises(UserError, match="without labels"):
        cleaning.rank(dataclasses.replace(manifest, table=manifest.table.drop(columns="label")), [oof])
    with pytest.raises(UserError, match="classes"):
        cleaning.rank(manifest, [dataclasses.replace(oof, classes=("x", "y", "z"))])


def test_two_files_may_not_speak_for_one_member_of_the_same_rows(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path)
    oof, other = make_oof(manifest, truth), make_oof(manifest, truth, 1)
    halves = [oof.take(manifest.sample_ids[manifest.fold < 2]), oof.take(manifest.sample_ids[manifest.fold >= 2])]
    files = [one.save(tmp_path / f"{number}.parquet") for number, one in enumerate((*halves, other, oof))]
    assert len(cleaning.find_oof("world", files[:3], "production")) == 3
    with pytest.raises(UserError, match=f"'net', seed 0 predicts .* rows in {files[0]}"):
        cleaning.find_oof("world", files, "production")


def test_images_deleted_meanwhile_leave_a_queue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    manifest = dataclasses.replace(manifest, competition=str(tmp_path / "here"))
    manifest.paths[0].unlink()
    vectors = embed(manifest, "plain")
    assert vectors is not None
    assert "1 images of the manifest are gone" in caplog.text
    assert len(vectors.sample_ids) == len(manifest.table) - 1
    queue = cleaning.rank(manifest, [make_oof(manifest, truth)], vectors)
    assert {item.sample_id for item in queue.items[:3]} == ids_of(manifest, WRONG)
    assert len(queue.items) == len(manifest.table)
    assert embed(manifest, "none") is None


def test_the_table_is_the_queue(tmp_path: Path) -> None:
    manifest, truth = make_manifest(tmp_path, WRONG)
    queue = cleaning.rank(manifest, [make_oof(manifest, truth)], limit=5)
    table = pd.read_csv(queue.write(tmp_path / "out" / "queue.csv"))
    assert table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert table["sample_id"].tolist() == [item.sample_id for item in queue.items]
    empty = dataclasses.replace(queue, items=[]).table()
    assert list(empty.columns) == list(table.columns)


@pytest.mark.slow
def test_the_whole_command(house: House, tmp_path: Path) -> None:
    manifest, truth = make_manifest(house.home / "data" / "world", WRONG)
    oof = make_oof(manifest, truth).save(tmp_path / "oof.parquet")
    done = house.run(
        "clean", "--manifest", str(manifest.file), "--oof", str(oof), "--embed", "plain", "--serve", "false"
    )
    result = done.result
    assert result["samples"] == len(truth)
    assert result["flagged"] >= 3
    assert set(pd.read_csv(result["queue"])["sample_id"][:3]) == ids_of(manifest, WRONG)
    assert Path(result["journal"]) == house.home / "data" / "world" / "decisions.jsonl"
    assert json.loads(done.out.splitlines()[-1])["run_id"]
    test_table = dataclasses.replace(make_oof(manifest, truth), fold=None).save(tmp_path / "test.parquet")
    refused = house.run("clean", "--manifest", str(manifest.file), "--oof", str(test_table), "--serve", "false")
    assert refused.code == 2
    assert "Traceback" not in refused.err
