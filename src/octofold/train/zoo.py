"""Zoo: checkpoints and OOF made elsewhere, without a model card, become what a bundle holds.

What a card would say comes from a small YAML that the user writes (`Facts`). It is not believed: the network that these
facts describe must take the weights whole, and must give the out-of-fold probabilities that came with them.
"""

import csv
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field
from torch import nn

from octofold import config, tta
from octofold.config import Section
from octofold.data.images import PixelSpec, load, square
from octofold.data.manifest import Manifest
from octofold.errors import UserError, known, preview
from octofold.files import existing, sha256_file
from octofold.infer.passes import predict_rows
from octofold.nets import models, weights
from octofold.nets.models import NORMALIZE, ModelCard
from octofold.predictions import Predictions
from octofold.recipe import Model, Recipe

log = logging.getLogger("octofold")
ASKED = 32  # held-out images predicted anew, to see that facts and weights belong together
LEAST_AGREEMENT, MOST_APART = 0.8, 0.15  # share of equal labels; mean distance of probabilities (total variation)


class One(Section):
    """One fold model."""

    weights: str = Field(description="file inside the folder: .pth, .pt, .safetensors")
    oof: str = Field(
        description="its out-of-fold probabilities, CSV or parquet; may hold other folds, by a column fold"
    )
    fold: int = Field(ge=0, description="fold of the manifest that it did not see")
    seed: int = Field(0, ge=0, description="of its training")
    sha256: str = Field("", description="of the weights; empty = not checked here")


class Network(Section):
    """The network: what of a recipe's `model` decides how weights are run."""

    name: str = Field(description="timm model name, or one of our own")
    input_size: int = Field(ge=8, le=4096, description="side of the square it sees, px")
    normalize: Literal["imagenet", "half", "none"] | None = Field(
        None, description="mean and std of the pixels, by name"
    )
    mean: list[float] = Field([], description="or as numbers, of pixels in [0, 1]")
    std: list[float] = Field([], description="with mean")
    fit: Literal["crop", "squash", "pad"] = Field("crop", description="as in a recipe")
    crop_pct: float = Field(1.0, gt=0, le=1, description="as in a recipe")
    head: Literal["linear", "mlp"] = Field("linear", description="as in a recipe")
    head_hidden: int = Field(512, ge=1, description="as in a recipe")


class Facts(Section):
    """What a folder of checkpoints does not say of itself."""

    member: str = Field(pattern=r"^[A-Za-z0-9_\-]{1,60}$", description="what to call it")
    model: Network
    classes: list[str] = Field(min_length=2, description="names in the order of the network's outputs")
    views: str = Field("none", description="views that the OOF was averaged over: row of tta.VIEWS")
    image_column: str = Field("image", description="column of the OOF that names the image, if it has no sample_id")
    weights: str = Field(
        "", description="pattern of the weights' names with {fold} and perhaps {seed}: f{fold}/best.pth"
    )
    oof: str = Field("", description="pattern of the OOF's names; may be one file for all folds")
    slots: list[One] | str = Field(
        [], description="instead of patterns: a list, or a CSV weights,oof,fold,seed[,sha256]"
    )


def adopt(facts_file: Path, folder: Path, table: Manifest, scratch: Path) -> list[Path]:
    """Write a checkpoint folder with card and OOF for each slot that the facts name.

    Args:
        facts_file: YAML of `Facts`.
        folder: where weights and OOF lie.
        table: the manifest that they were trained on.
        scratch: takes ``<slot>/model/`` and ``<slot>/oof/``.

    Returns:
        the slots' folders.

    Raises:
        UserError: a fact that is missing or wrong; files that are not there or damaged; weights that do not fit the
            network, or do not give the OOF.
    """
    facts_file = existing(facts_file, "facts about the checkpoints (YAML)")
    facts = config.build(Facts, config.read_yaml(facts_file), str(facts_file))
    if table.task != "classify":
        raise UserError(
            facts_file, expected="a manifest of classes", got=table.task, fix="carry bundles (export, import)"
        )
    if odd := sorted(set(facts.classes) ^ set(table.classes)) or len(set(facts.classes)) < len(facts.classes):
        got = preview(odd) if isinstance(odd, list) else "a name twice"
        raise UserError(f"{facts_file}: classes", expected=f"the manifest's: {preview(table.classes, 20)}", got=got)
    known("views", facts.views, tta.VIEWS)
    recipe = Recipe(member=facts.member, model=_model(facts.model, facts_file), tta=facts.views)
    homes = []
    for one in slots(facts, folder, facts_file):
        home = scratch / f"{facts.member}.f{one.fold}.s{one.seed}"
        if home.exists():
            raise UserError(facts_file, expected="each fold and seed once", got=home.name)
        _adopt(one, facts, recipe, folder, table, home)
        homes.append(home)
    return homes


def slots(facts: Facts, folder: Path, where: object) -> list[One]:
    """Return the fold models: those listed, or every file that the pattern fits.

    Raises:
        UserError: neither list nor pattern, nothing found, a row that is none.
    """
    if isinstance(facts.slots, str):
        file = inside(folder, facts.slots, where)
        try:
            rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig")), strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(file, expected="CSV weights,oof,fold,seed[,sha256]", got=str(error)) from error
        plain = [{str(key): value for key, value in row.items() if value} for row in rows]
        return [config.build(One, row, f"{file}, line {number}") for number, row in enumerate(plain, start=2)]
    if facts.slots:
        return facts.slots
    if "{fold}" not in facts.weights or not facts.oof:
        expected = "slots (weights, oof, fold, seed), or weights and oof as patterns with {fold}"
        raise UserError(where, expected=expected, got=f"weights: {facts.weights!r}, oof: {facts.oof!r}")
    pattern = re.escape(facts.weights)
    for name in ("fold", "seed"):
        first, *more = pattern.split(re.escape(f"{{{name}}}"))
        pattern = first + "".join(
            (rf"(?P<{name}>\d+)" if not n else rf"(?P={name})") + part for n, part in enumerate(more)
        )
    found = []
    for path in sorted(folder.rglob("*")):
        if match := re.fullmatch(pattern, path.relative_to(folder).as_posix()):
            told = match.groupdict("0")
            oof = facts.oof.replace("{fold}", told["fold"]).replace("{seed}", told.get("seed", "0"))
            found.append(One(weights=match[0], oof=oof, fold=int(told["fold"]), seed=int(told.get("seed", "0"))))
    if not found:
        there = [path.name for path in sorted(folder.rglob("*")) if path.suffix in (".pth", ".pt", ".safetensors")]
        raise UserError(folder, expected=f"files named {facts.weights}", got=preview(there) or "no weights at all")
    return found


def inside(folder: Path, name: str, where: object) -> Path:
    """Return the file of that name in the folder.

    Raises:
        UserError: a name that leaves the folder, also through a link, or no such file.
    """
    parts = PurePosixPath(name).parts
    path = folder / name
    if not parts or name.startswith("/") or ".." in parts or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(where, expected=f"a file inside {folder}", got=repr(name[:200]))
    return existing(path, f"a file that {where} names")


def _model(network: Network, where: object) -> Model:
    plain = network.model_dump(exclude={"mean", "std", "normalize"})
    given = (tuple(network.mean), tuple(network.std))
    name: Any = network.normalize
    if name is None:
        name = next((key for key, both in NORMALIZE.items() if _close(given, both)), None)
    if name is None or (any(given) and not _close(given, NORMALIZE[name])):
        shown = "; ".join(f"{key}: {mean} / {std}" for key, (mean, std) in NORMALIZE.items())
        got = f"normalize {network.normalize}, mean {network.mean}, std {network.std}"
        raise UserError(f"{where}: model.normalize", expected=f"one of {shown} (or these as mean and std)", got=got)
    return Model(**plain, normalize=name)


def _close(given: Sequence[Sequence[float]], both: Sequence[Sequence[float]]) -> bool:
    return all(len(one) == 3 and np.allclose(one, two, atol=0.006) for one, two in zip(given, both, strict=True))


def _adopt(one: One, facts: Facts, recipe: Recipe, folder: Path, table: Manifest, home: Path) -> None:
    file = inside(folder, one.weights, "weights")
    if one.sha256 and (sha := sha256_file(file)) != one.sha256.lower():
        raise UserError(file, expected=f"sha256 {one.sha256[:12]}…", got=f"{sha[:12]}…: changed or damaged")
    net = read_network(file, recipe.model, facts.classes, table.classes)
    card = ModelCard(
        recipe=recipe.model_dump(mode="json"), task=table.task, classes=table.classes, competition=table.competition,
        member=facts.member, fold=one.fold, seed=one.seed, manifest_hash=table.hash,
        info={"origin": "import", "file": one.weights, "file_sha256": sha256_file(file)},
    )  # fmt: skip
    card = models.write_model(home / "model", net, card)
    ids, values = read_oof(inside(folder, one.oof, "oof"), facts, one.fold, table)
    oof = Predictions(
        sample_ids=ids, values=values, classes=table.classes, manifest_hash=table.hash, member=facts.member,
        model_sha=card.model_sha, views=facts.views, fold=np.full(len(ids), one.fold), seed=one.seed,
    )  # fmt: skip
    held = set(table.sample_ids[table.fold == one.fold].tolist())
    if not held or (odd := held ^ set(ids.tolist())):
        got = (
            f"{len(odd)} samples differ ({preview(sorted(odd), 3)})" if held else f"folds {table.folds} in the manifest"
        )
        raise UserError(
            one.oof, expected=f"OOF of exactly the {len(held)} samples of fold {one.fold}", got=got,
            fix="the folds must be those the model was trained with: prepare --folds_file",
        )  # fmt: skip
    _compare(net, card, oof, table, file)
    oof.save(home / "oof" / f"{facts.views}.parquet")


def read_network(file: Path, model: Model, classes: Sequence[str], order: Sequence[str]) -> models.Net:
    """Read foreign weights into the network they are said to be of, its outputs brought into the manifest's order.

    Raises:
        UserError: no such network, weights that are not all of it, or a head for another number of classes.
    """
    net = models.build(model, len(classes), start=file)
    last = [layer for layer in net.head.modules() if isinstance(layer, nn.Linear)][-1]
    state = weights.read_file(file)
    if not any(value.shape == last.weight.shape and torch.equal(value, last.weight) for value in state.values()):
        heads = [tuple(value.shape) for value in state.values() if value.ndim == 2][-1:]
        raise UserError(
            file, expected=f"a last layer of {len(classes)} outputs x {last.in_features} features",
            got=f"{heads[0] if heads else 'no linear layer'}", fix="check classes, model.name and model.head",
        )  # fmt: skip
    rows = torch.tensor([list(classes).index(name) for name in order])
    with torch.no_grad():
        last.weight.copy_(last.weight[rows].clone())
        last.bias.copy_(last.bias[rows].clone())
    return net.eval()


def read_oof(
    path: Path, facts: Facts, fold: int, table: Manifest
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.float32]]:
    """Read a foreign OOF table: one row per image, one column per class, by name.

    Returns:
        sample ids and ``(n, K)`` probabilities in the manifest's class order, of the rows of this fold.

    Raises:
        UserError: not a table, columns missing, images that the manifest does not have, labels that it has otherwise.
    """
    try:  # as text: 001, NA and 1.0 are names
        is_parquet = path.suffix == ".parquet"
        found = pd.read_parquet(path) if is_parquet else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own are ValueErrors
        raise UserError(path, expected="out-of-fold probabilities, CSV or parquet", got=str(error)[:200]) from error
    column = "sample_id" if "sample_id" in found else facts.image_column
    styles: list[dict[str, str]] = [{name: f"{start}{name}" for name in table.classes} for start in ("", "p_", "prob_")]
    names = next((one for one in styles if set(one.values()) <= set(map(str, found.columns))), None)
    if column not in found or names is None:
        expected = f"sample_id or {facts.image_column}, and a column per class (name, p_name or prob_name)"
        raise UserError(path, expected=expected, got=f"columns {preview(found.columns, 20)}")
    if "fold" in found:
        found = found[found["fold"].astype(str).str.removesuffix(".0") == str(fold)]
    place = {key: row for row, key in enumerate(table.sample_ids.tolist())}
    if column != "sample_id":
        place = {Path(name).name: row for row, name in enumerate(table.table["path"])} | dict(
            zip(table.table["path"], range(len(table.table)), strict=True)
        )
    keys = found[column].astype(str)
    if lost := [key for key in keys if key not in place]:
        raise UserError(path, expected=f"images of {table.file}", got=f"{len(lost)} that are not: {preview(lost)}")
    rows = [place[key] for key in keys]
    if "label" in found:
        mine = table.table["label"].astype(str).to_numpy()[rows]
        odd = found["label"].astype(str).to_numpy() != mine
        if odd.mean() > 0.5:
            raise UserError(path, expected="the manifest's labels", got=f"{odd.sum()} of {len(odd)} others")
        log.info("%s: %d of %d labels were others than the manifest's", path.name, odd.sum(), len(odd))
    try:
        values = found[list(names.values())].to_numpy(np.float32)
    except ValueError as error:
        raise UserError(path, expected="numbers", got=str(error)) from error
    return table.sample_ids[rows], values


def _compare(net: models.Net, card: ModelCard, oof: Predictions, table: Manifest, file: Path) -> None:
    """Predict a few of the held-out images anew: facts, weights and OOF belong together, or are refused."""
    place = {key: row for row, key in enumerate(table.sample_ids.tolist())}
    some = np.random.default_rng(0).permutation(oof.sample_ids)[:ASKED].tolist()
    spec = PixelSpec.of(Model(**card.recipe["model"]))
    squares = (square(load(table.paths[place[key]], spec, key)[0], spec.size)[None] for key in some)
    ours, theirs = predict_rows(net, card, squares, views=oof.views)[oof.views], oof.take(some).values
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    apart = float(np.abs(ours - theirs).sum(axis=1).mean() / 2)
    text = f"{agreement:.0%} of {len(some)} labels agree, probabilities {apart:.3f} apart"
    if agreement < LEAST_AGREEMENT or apart > MOST_APART:
        raise UserError(
            f"{file} (fold {card.fold})", expected="weights that give the OOF that came with them", got=text,
            fix="check the order of classes, model.normalize, input_size, fit, crop_pct, views, and which fold it is",
        )  # fmt: skip
    log.info("%s: fold %d: %s", file.name, card.fold, text)
