"""Bundles: every byte and every claim is checked before anything is registered."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import House
from labelled import CLASSES, make_manifest, make_oof
from octofold.commands import Export
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import sha256_file
from octofold.nets.models import ModelCard, build, read_card, write_model
from octofold.recipe import Model, Recipe
from octofold.track import registry, tracking
from octofold.train import bundles


@pytest.fixture
def world(tmp_path: Path) -> tuple[Manifest, Path]:
    """A manifest, and the unpacked bundle of a slot trained on it (fold 2, seed 0)."""
    manifest, truth = make_manifest(tmp_path / "data" / "world")
    home = tmp_path / "bundle" / "net.f2.s0"
    recipe = Recipe(member="net", model=Model(name="small_cnn", input_size=32))
    card = ModelCard(recipe.model_dump(mode="json"), "classify", CLASSES, "world", "net", 2, 0, manifest.hash)
    card = write_model(home / "model", build(recipe.model, 3), card)
    oof = make_oof(manifest, truth).take(manifest.sample_ids[manifest.fold == 2].tolist())
    dataclasses.replace(oof, model_sha=card.model_sha).save(home / "oof" / "none.parquet")
    return manifest, home


def listed(folder: Path) -> str:
    text = io.StringIO()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "files.csv"]
    rows = [["x", path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path)] for path in files]
    csv.writer(text).writerows([bundles.COLUMNS, *rows])
    return text.getvalue()


def zipped(folder: Path, target: Path, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", how) as bundle:
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "files.csv":
                bundle.write(path, path.relative_to(folder))
        bundle.writestr("files.csv", listed(folder))
    return target


def test_a_sound_slot_passes(world: tuple[Manifest, Path]) -> None:
    manifest, home = world
    card, found = bundles.check(home, manifest)
    assert (card.fold, len(found), found[0].views) == (2, 1, "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"competition": "other"}, "competition"),
        ({"classes": CLASSES[::-1]}, "classes in this order"),
        ({"manifest_hash": "0" * 64}, "manifest hash"),
        ({"fold": 7}, "fold of the manifest"),
        ({"fold": 1}, "OOF of exactly"),
        ({"member": "another"}, "OOF made by these weights"),
    ],
)
def test_claims_that_do_not_fit_are_refused(
    world: tuple[Manifest, Path], change: dict[str, object], words: str
) -> None:
    manifest, home = world
    net = build(Model(name="small_cnn", input_size=32), 3)
    write_model(home / "model", net, dataclasses.replace(read_card(home / "model"), **change))
    with pytest.raises(UserError, match=words):
        bundles.check(home, manifest)


def test_oof_under_the_name_of_other_views_is_refused(world: tuple[Manifest, Path]) -> None:
    manifest, home = world
    (home / "oof" / "none.parquet").rename(home / "oof" / "geo8.parquet")
    with pytest.raises(UserError, match="views none"):
        bundles.check(home, manifest)


def test_weights_that_are_not_the_cards_are_refused(world: tuple[Manifest, Path]) -> None:
    manifest, home = world
    with (home / "model" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="weights"):
        bundles.check(home, manifest)


@pytest.mark.parametrize("kind", ["zip", "folder", "csv"])
def test_each_kind_of_bundle_is_read_and_its_bytes_checked(
    world: tuple[Manifest, Path], tmp_path: Path, kind: str
) -> None:
    folder = world[1].parent
    text = listed(folder)
    (folder / "files.csv").write_text(text)
    source = {"zip": zipped(folder, tmp_path / "b.zip"), "folder": folder, "csv": folder / "files.csv"}[kind]
    with bundles.unpacked(source) as (place, found):
        assert {one.name for one in found} == {line.split(",")[1] for line in text.splitlines()[1:]}
        assert all((place / one.name).stat().st_size == one.size for one in found)
    assert not place.exists()
    (folder / "files.csv").write_text(text.replace(text.split(",")[-1].strip(), "0" * 64))
    with pytest.raises(UserError, match="changed or damaged"), bundles.unpacked(folder):
        pass


def test_cut_and_foreign_archives_are_refused(world: tuple[Manifest, Path], tmp_path: Path) -> None:
    whole = zipped(world[1].parent, tmp_path / "b.zip").read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"PK\x03\x04", b"hello"):
        path = tmp_path / "cut.zip"
        path.write_bytes(data)
        with pytest.raises(UserError), bundles.unpacked(path):
            pass


def test_what_is_exported_was_trained_on_the_manifest_at_hand(
    world: tuple[Manifest, Path], mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "ROOT", tmp_path)
    manifest, home = world
    card = read_card(home / "model")
    for hashed in (manifest.hash, "b" * 64):  # as `worth` does, when it trains on the manifest before
        write_model(home / "model", build(Model(name="small_cnn", input_size=32), 3),
                    dataclasses.replace(card, manifest_hash=hashed))  # fmt: skip
        with tracking.run("train.slot", None, "world") as run:
            run.log_artifacts(home / "oof", "oof")
            registry.register_slot(run, home / "model")
    bundle = bundles.export(Export(competition="world", member="net", out=tmp_path / "out.zip"))["bundle"]
    with zipfile.ZipFile(bundle) as packed:
        assert json.loads(packed.read("net.f2.s0/model/model.json"))["manifest_hash"] == manifest.hash


def test_a_damaged_deflated_bundle_is_refused(world: tuple[Manifest, Path], tmp_path: Path) -> None:
    path = zipped(world[1].parent, tmp_path / "b.zip", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as bundle:
        start = next(info for info in bundle.infolist() if info.filename.endswith("safetensors")).header_offset
    data = bytearray(path.read_bytes())
    data[start + 200 : start + 400] = bytes(byte ^ 0xFF for byte in data[start + 200 : start + 400])
    path.write_bytes(data)
    with pytest.raises(UserError, match="a bundle"), bundles.unpacked(path):
        pass


SHA = "a" * 64


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "C:\\x", "a\\..\\b", "x\0y"])
def test_names_that_leave_the_bundle_are_refused(name: str) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([bundles.COLUMNS, ["s", name, 3, SHA]])
    with pytest.raises(UserError):
        bundles.read_list(text.getvalue(), "files.csv")


@given(st.text(max_size=200) | st.lists(st.text(max_size=12), max_size=20).map(",".join))
def test_any_list_is_read_or_refused(text: str) -> None:
    for header in ("", "id,name,bytes,sha256\n"):
        try:
            found = bundles.read_list(header + text, "files.csv")
        except UserError:
            continue
        assert all(".." not in one.name.split("/") and not one.name.startswith("/") for one in found)


ROUND = """
import sys
from pathlib import Path
from octofold.train import bundles
from octofold.commands import Export, Import

bundle, manifest, out = map(Path, sys.argv[1:])
for new in (1, 0):
    done = bundles.take_in(Import(bundle=bundle, manifest=manifest))
    assert (done["slots"], done["new"]) == (["world.net.f2.s0/1"], new), done
assert bundles.export(Export(competition="world", member="net", out=out))["files"] == 3
assert bundles.take_in(Import(bundle=out, manifest=manifest))["new"] == 0
"""


@pytest.mark.slow
def test_importing_twice_is_importing_once(house: House, world: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, home = world
    bundle = zipped(home.parent, tmp_path / "b.zip")
    command = [sys.executable, "-c", ROUND, str(bundle), str(manifest.file), str(tmp_path / "again.zip")]
    done = subprocess.run(command, env=house.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


AT_ONCE = """
import sys
import time
from pathlib import Path
from octofold.commands import Import
from octofold.infer import serving
from octofold.train import bundles

pack = serving.pack_slot
serving.pack_slot = lambda *files: (time.sleep(5), pack(*files))[1]  # a slow disk, after the look and before the entry
done = bundles.take_in(Import(bundle=Path(sys.argv[1]), manifest=Path(sys.argv[2])))
print(done["slots"], done["new"])
"""


@pytest.mark.slow
def test_of_two_imports_at_once_one_registers(house: House, world: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, home = world
    bundle = zipped(home.parent, tmp_path / "b.zip")
    command = [sys.executable, "-c", AT_ONCE, str(bundle), str(manifest.file)]
    both = [
        subprocess.Popen(command, env=house.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(out.splitlines()[-1] for out, _ in said) == [f"['world.net.f2.s0/1'] {new}" for new in (0, 1)]
