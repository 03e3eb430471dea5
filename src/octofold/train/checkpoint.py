"""Checkpoints: all a killed training needs to go on bit for bit, and the proof that it is still the same training."""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import atomic, existing, read_json, sha256_file, sha256_json, write_json
from octofold.metrics import fingerprint
from octofold.recipe import Recipe
from octofold.train import origin
from octofold.train.distill import find_teacher

CODE = (
    "augment", "batches", "checkpoint", "decoding", "distill", "features", "harden", "images", "job", "machine",
    "metrics", "models", "networks", "optim", "outcome", "recipe", "tasks", "training", "validation", "weights",
)  # fmt: skip
"""Modules whose text decides what comes out of a training: `recipe` for the defaults, which `settings_of` leaves out,
`metrics` as it chooses the epoch."""
LIBRARIES = ("albumentations", "timm", "torch")
ELSEWHERE = ("folds", "seeds", "member", "runtime", "tta")
"""Recipe fields that do not change a slot's weights (or name it)."""


def settings_of(recipe: Recipe) -> dict[str, str]:
    """Return ``{"recipe optim.lr": "0.01", …}``: the fields that decide a slot's weights and are not at their default.

    Defaults are left out, so that a setting added later does not make every older training another one.
    """
    plain = recipe.model_dump(mode="json", exclude_defaults=True, include=set(Recipe.model_fields) - set(ELSEWHERE))
    plain |= fingerprint(recipe.metric)
    return {f"recipe {name}": json.dumps(value, sort_keys=True) for name, value in _leaves(plain, "")}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif name:
        yield name, value


def recipe_hash(recipe: Recipe) -> str:
    """Return 16 hex digits that name a recipe's settings: equal settings, equal name, whatever the member is called."""
    return sha256_json(settings_of(recipe))[:16]


def code_versions() -> dict[str, str]:
    """Return ``{"code training.py": sha, …, "library torch": version}``."""
    here = Path(__file__).parents[1]
    texts = {f"code {name}.py": next(here.rglob(f"{name}.py")) for name in CODE}
    shas = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in texts.items()}
    return shas | {f"library {name}": version(name) for name in LIBRARIES}


def identity(recipe: Recipe, table: Manifest, fold: int, seed: int, start: Path | None = None) -> dict[str, str]:
    """Return what must be unchanged for a training to go on: recipe, manifest, slot, start, code, libraries."""
    slot = {"manifest hash": table.hash, "fold": str(fold), "seed": str(seed)} | swap_tag(table)
    if start is not None:
        slot["starting weights"] = origin.sha256(start)
    return settings_of(recipe) | slot | fingerprints(recipe) | code_versions()


def swap_tag(table: Manifest) -> dict[str, str]:
    """Return the sha256 of the swap table, which says what mirrored points are trained towards, if there is one."""
    swap = table.info.get("swap")  # no part of the manifest's hash
    return {"swap.sha256": sha256_json(swap)} if swap else {}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Return the sha256 of each file of predictions a recipe learns from, by its setting; nothing where none is set.

    An address may stay while what lies there changes: ``models:/X.blend@production`` after the next blend.
    """
    found = {}
    if recipe.distill.teacher:
        found["distill.teacher.sha256"] = sha256_file(find_teacher(recipe.distill.teacher))
    if recipe.augment.easy.oof is not None:
        easy = existing(recipe.augment.easy.oof, "the OOF Predictions of a member trained before (augment.easy.oof)")
        found["augment.easy.oof.sha256"] = sha256_file(easy)
    return found


def claim(folder: Path, now: dict[str, str]) -> None:
    """Write down, in a fresh folder, which training this is; or see that it is the one begun here.

    Raises:
        UserError: anything in `identity` differs.
    """
    path = folder / "identity.json"
    if path.exists():
        then = read_json(path, "the identity of a training")
        if (folder / "done.json").exists():  # trained, only not registered yet: new code changes nothing any more
            now = {**now, **{name: then[name] for name in then if name.startswith(("code ", "library "))}}
        check_same(folder, then, now)
    else:
        write_json(path, now)


def check_same(folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with another training's checkpoint, naming what differs.

    Raises:
        UserError: anything in `identity` differs.
    """
    changed = [name for name in {*then, *now} if then.get(name) != now.get(name)]
    changed.sort(key=lambda name: (not name.startswith("recipe"), not name.startswith("manifest"), name))
    if changed:
        shown = [f"{name} ({_short(then.get(name))} -> {_short(now.get(name))})" for name in changed]
        raise UserError(
            folder,
            expected="the recipe, manifest and code that this unfinished training began with",
            got=f"changed: {preview(shown, 8)}",
            fix="put them back to go on from the checkpoint, or begin anew with --restart true",
        )


def _short(value: str | None) -> str:
    return "default" if value is None else value if len(value) <= 24 else value[:12] + "…"


@dataclass
class Clock:
    """Says when a checkpoint is due: every `every_s` seconds, but writing may take 1 % of the time at most."""

    every_s: float
    wrote_at: float = 0.0
    cost_s: float = 0.0

    def __post_init__(self) -> None:
        self.wrote_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last write."""
        wait = self.every_s if self.every_s == 0 else max(self.every_s, 100 * self.cost_s)
        return time.monotonic() - self.wrote_at >= wait

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the checkpoint and start counting anew."""
        begun = time.monotonic()
        save(folder, state)
        self.wrote_at = time.monotonic()
        self.cost_s = self.wrote_at - begun


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``checkpoint.pt``, whole or not at all: tensors and plain values only."""
    with atomic(folder / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def load(folder: Path) -> dict[str, Any] | None:
    """Read ``checkpoint.pt``, or None if there is none. Nothing in it is executed.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
            path, expected="a checkpoint", got=str(error).splitlines()[0], fix="begin anew with --restart true"
        ) from error
    return state
