"""Bundles: fold models and their OOF carried between machines, every byte checked before anything is registered.

A bundle is a zip (or folder) with ``files.csv`` (id,name,bytes,sha256; id is the slot) and, for each slot,
``<slot>/model/`` (a checkpoint folder) and ``<slot>/oof/<views>.parquet``. Only files that the list names are read.
"""

import csv
import io
import logging
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from octofold.commands import Export, Import
from octofold.config import build
from octofold.data import manifest as manifests
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic, existing, sha256_file
from octofold.infer import serving
from octofold.nets.models import ModelCard, read_card
from octofold.nets.tasks import make_task
from octofold.predictions import Predictions
from octofold.recipe import Recipe
from octofold.track import registry, tracking
from octofold.track.store import lock_file, locked, uri
from octofold.train import checkpoint, zoo
from octofold.train.training import metric_of

log = logging.getLogger("octofold")
LIST = "files.csv"
COLUMNS = ["id", "name", "bytes", "sha256"]
MOST = 20 << 30  # bytes a bundle may unpack to


def export(settings: Export) -> dict[str, Any]:
    """Write the bundle of a member.

    Raises:
        UserError: no such member, versions or files that are gone, no room.
    """
    if settings.stage:
        slots = registry.resolve(settings.competition, settings.stage, [settings.member])[settings.member]
    else:
        file = ROOT / "data" / settings.competition / "manifest.csv"
        at_hand = manifests.read(file).hash if file.exists() else None
        listed = registry.models(settings.competition, [settings.member])
        found = [slot for slot in registry.newest_on(listed, at_hand) if slot is not None]
        slots = sorted(found, key=lambda slot: slot.name)
    if not slots:
        raise UserError(f"member '{settings.member}'", expected="registered fold models", got="none", fix="train it")
    out = settings.out or ROOT / "runs" / "export" / f"{settings.competition}.{settings.member}.zip"
    rows = []
    with atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as bundle:
        for slot in slots:
            name = f"{slot.member}.f{slot.fold}.s{slot.seed}"
            for part, folder in (("model", registry.fetch(slot)), ("oof", tracking.download(slot.run_id, "oof"))):
                for path in sorted(folder.iterdir()):
                    if path.suffix in (".safetensors", ".json", ".parquet"):
                        inside = f"{name}/{part}/{path.name}"
                        bundle.write(path, inside)
                        rows.append([name, inside, path.stat().st_size, sha256_file(path)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        bundle.writestr(LIST, text.getvalue())
    return {"bundle": str(out), "slots": [slot.name for slot in slots], "files": len(rows), "bytes": out.stat().st_size}


@dataclass(frozen=True)
class Listed:
    """A line of ``files.csv``."""

    slot: str
    name: str
    size: int
    sha256: str


def read_list(text: str, where: object) -> list[Listed]:
    """Parse ``files.csv``; every name must be a plain path inside the bundle.

    Raises:
        UserError: other columns, a size or sha that is none, a name that leaves the bundle or comes twice.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    try:
        names, rows = list(reader.fieldnames or ["nothing"]), list(reader)
    except csv.Error as error:
        raise UserError(where, expected="a CSV file", got=str(error)) from error
    if not set(COLUMNS) <= set(names):
        raise UserError(where, expected=f"columns {', '.join(COLUMNS)}", got=preview(names))
    found = []
    for number, row in enumerate(rows, start=2):
        name, size, sha = (str(row[key] or "") for key in COLUMNS[1:])
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name or "\0" in name:
            raise UserError(f"{where}, line {number}", expected="a path inside the bundle", got=repr(name[:100]))
        if not (size.isascii() and size.isdigit()) or len(size) > 15 or len(sha) != 64:
            raise UserError(f"{where}, line {number}", expected="bytes and sha256", got=f"{size[:20]!r}, {sha[:70]!r}")
        found.append(Listed(str(row["id"] or ""), name, int(size), sha.lower()))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UserError(where, expected="each name once", got="repeated names")
    if not found or sum(one.size for one in found) > MOST:
        raise UserError(where, expected=f"files, at most {MOST >> 30} GiB", got=f"{len(found)} files")
    return found


@contextmanager
def unpacked(source: Path) -> Iterator[tuple[Path, list[Listed]]]:
    """Give the bundle's files in a folder of their own, each of the size and sha256 its list says.

    Raises:
        UserError: no bundle, or a file that is missing, cut or changed.
    """
    source = existing(source, "a bundle (.zip, folder, or files.csv)")
    source = source / LIST if source.is_dir() else source
    with tempfile.TemporaryDirectory(prefix=".import-", dir=_scratch()) as scratch:
        if source.suffix == ".csv":
            listed = read_list(existing(source, LIST).read_text(encoding="utf-8", errors="replace"), source)
            for one in listed:
                path = source.parent / one.name
                if not path.resolve().is_relative_to(source.parent.resolve()) or not path.is_file():
                    raise UserError(path, expected="a file inside the bundle", got="none")
                _check_size(one, path.stat().st_size)
                target = Path(scratch) / one.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        else:
            listed = _unzip(source, Path(scratch))
        for one in listed:
            if (sha := sha256_file(Path(scratch) / one.name)) != one.sha256:
                raise UserError(one.name, expected=f"sha256 {one.sha256[:12]}…", got=f"{sha[:12]}…: changed or damaged")
        yield Path(scratch), listed


def _unzip(source: Path, folder: Path) -> list[Listed]:
    try:
        with zipfile.ZipFile(source) as bundle:
            listed = read_list(bundle.read(LIST).decode("utf-8", "replace"), f"{source}/{LIST}")
            for one in listed:
                _check_size(one, bundle.getinfo(one.name).file_size)
                target = folder / one.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with bundle.open(one.name) as inside, target.open("wb") as file:
                    shutil.copyfileobj(inside, file)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(source, expected=f"a bundle (zip with {LIST})", got=str(error)[:200]) from error
    return listed


def _check_size(one: Listed, size: int) -> None:
    if size != one.size:
        raise UserError(one.name, expected=f"{one.size} bytes", got=f"{size}")


def take_in(settings: Import) -> dict[str, Any]:
    """Check a whole bundle, then register its slots; a slot that is here already (same weights) is left as it is.

    Of two imports at once on one machine the second waits and finds the first one's slots.

    Raises:
        UserError: whatever does not fit; nothing is registered then.
    """
    table = manifests.read(settings.manifest)
    with _slots(settings, table) as homes:
        checked = [check(home, table) for home in homes]
        with tracking.run("import", settings, table.competition, f"import {settings.bundle.name}") as parent:
            # the look for a slot and its entry belong together
            with locked(lock_file(uri()).with_suffix(".import.lock")):
                done = [_register(home, *found, table, parent) for home, found in zip(homes, checked, strict=True)]
    return {"run_id": parent.id, "slots": [name for name, _ in done], "new": sum(new for _, new in done)}


@contextmanager
def _slots(settings: Import, table: Manifest) -> Iterator[list[Path]]:
    """Give the slots' folders: as the bundle has them, or made of foreign files by what the user says of them."""
    if settings.facts is not None:
        source = existing(settings.bundle, "a folder of weights and OOF, a bundle (.zip), or a files.csv")
        with tempfile.TemporaryDirectory(prefix=".import-", dir=_scratch()) as scratch:
            if source.is_dir() and not (source / LIST).exists():
                yield zoo.adopt(settings.facts, source, table, Path(scratch))
                return
            with unpacked(source) as (folder, _):
                yield zoo.adopt(settings.facts, folder, table, Path(scratch))
        return
    with unpacked(settings.bundle) as (folder, listed):
        homes = sorted({one.name.rpartition("/model/")[0] for one in listed if one.name.endswith("/model/model.json")})
        if not homes:
            fix = "weights made elsewhere need --facts"
            names = preview([one.name for one in listed])
            raise UserError(settings.bundle, expected="<slot>/model/model.json", got=names, fix=fix)
        yield [folder / home for home in homes]


def _scratch() -> Path:
    (ROOT / "mlruns").mkdir(parents=True, exist_ok=True)
    return ROOT / "mlruns"


def check(home: Path, table: Manifest) -> tuple[ModelCard, list[Predictions]]:
    """Return a slot's card and OOF if they belong to this manifest.

    Raises:
        UserError: another competition, manifest, class order, fold membership, or weights that are not the card's.
    """
    card = read_card(home / "model")
    where = f"{home.name} (member {card.member}, fold {card.fold}, seed {card.seed})"
    weights = home / "model" / "model.safetensors"
    sha = sha256_file(weights) if weights.is_file() else "none"
    wanted: Sequence[tuple[str, object, object]] = (
        ("weights", card.model_sha, sha),
        ("competition", table.competition, card.competition),
        ("task", table.task, card.task),
        ("classes in this order", preview(table.classes, 20), preview(card.classes, 20)),
        ("manifest hash", table.hash[:16], card.manifest_hash[:16]),
        ("fold of the manifest", True, card.fold in table.folds),
    )
    for what, expected, got in wanted:
        if expected != got:
            raise UserError(where, expected=f"{what}: {expected}", got=str(got))
    held = set(table.sample_ids[table.fold == card.fold].tolist())
    loaded = {path.stem: Predictions.load(path) for path in sorted((home / "oof").glob("*.parquet"))}
    found = list(loaded.values())
    for views, oof in loaded.items():
        if oof.views != views:
            raise UserError(f"{where}: oof/{views}.parquet", expected=f"views {views}", got=f"views {oof.views}")
        folds = set() if oof.fold is None else set(oof.fold.tolist())
        if folds != {card.fold} or set(oof.sample_ids.tolist()) != held:
            odd = held ^ set(oof.sample_ids.tolist())
            got = f"folds {sorted(folds) or 'none'}, {len(odd)} samples differ ({preview(sorted(odd), 3)})"
            raise UserError(where, expected=f"OOF of exactly the {len(held)} samples of fold {card.fold}", got=got)
        if (oof.member, oof.model_sha, oof.classes) != (card.member, card.model_sha, tuple(card.classes)):
            raise UserError(
                where, expected="OOF made by these weights", got=f"OOF of {oof.member}, {oof.model_sha[:12]}"
            )
    if not found:
        raise UserError(where, expected="OOF (oof/<views>.parquet)", got="none: without it nothing can be estimated")
    return card, found


def _register(
    home: Path, card: ModelCard, oof: list[Predictions], table: Manifest, parent: tracking.Run
) -> tuple[str, bool]:
    """Register one checked slot as train does, so that train finds it and does not train it again."""
    name = registry.slot_name(card.competition, card.member, card.fold, card.seed)
    for slot in registry.slots(card.competition, [card.member]).get(card.member, {}).get(name, []):
        if slot.model_sha == card.model_sha:
            log.info("%s: here already, as version %d", name, slot.version)
            return f"{name}/{slot.version}", False
    recipe = build(Recipe, card.recipe, home / "model" / "model.json")
    tags = {
        "member": card.member, "recipe_hash": checkpoint.recipe_hash(recipe), "manifest_hash": card.manifest_hash,
        "fold": str(card.fold), "seed": str(card.seed), "origin": "import",
    }  # fmt: skip
    title = f"{card.member} f{card.fold} s{card.seed}"
    with tracking.run("train.slot", None, card.competition, title, tags, parent) as run:
        run.log_artifacts(home / "oof", "oof")
        task = make_task(table.task, table.classes, table.info.get("swap"))
        metric = metric_of(recipe, task)
        place = {one: row for row, one in enumerate(table.sample_ids.tolist())}
        for part in oof:
            truth = table.target[[place[one] for one in part.sample_ids.tolist()]]
            run.log_metrics({f"oof.{part.views}/{metric}": task.score(part.values, truth, metric)})
        packed = serving.pack_slot(home / "model", home)
        slot = registry.register_slot(run, packed, {"recipe_hash": tags["recipe_hash"]})
        run.set_tags({"registered": f"{slot.name}/{slot.version}", "model_sha": card.model_sha})
    return f"{slot.name}/{slot.version}", True
