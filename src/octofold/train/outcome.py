"""The outcome of a slot: the chosen weights, their out-of-fold predictions, and the word that it is done."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from octofold import tta
from octofold.files import atomic, read_json, write_json
from octofold.infer.passes import nested, predict_rows, to_pixels
from octofold.nets import models
from octofold.predictions import Predictions
from octofold.recipe import Recipe
from octofold.train import optim
from octofold.train.batches import seed_of
from octofold.train.job import Job, frozen_trunk
from octofold.train.validation import VALID_BATCH, chunks, validate

log = logging.getLogger("octofold")
OOF_BATCH = 8


@dataclass
class SlotResult:
    """What a slot leaves behind.

    Attributes:
        model_folder: checkpoint folder of the chosen weights.
        oof: for each nested view set, predictions of the held-out rows.
        history: one row per epoch.
        metrics: ``oof/<metric>`` and others, by their MLflow names.
    """

    model_folder: Path
    oof: dict[str, Predictions]
    history: pd.DataFrame
    metrics: dict[str, float]


def finish(job: Job) -> SlotResult:
    """Choose the weights, predict the held-out rows, write everything, and only then say that it is done."""
    chosen = _choose(job)
    if job.devices.is_main:
        best = job.progress.best
        card = models.ModelCard(
            recipe=job.recipe.model_dump(mode="json", include=set(Recipe.model_fields)),
            task=job.manifest.task,
            classes=job.manifest.classes,
            competition=job.manifest.competition,
            member=job.recipe.member,
            fold=job.fold,
            seed=job.seed,
            manifest_hash=job.manifest.hash,
            swap=job.manifest.info.get("swap"),
            info={"chosen": chosen, "epoch": best["epoch"], f"valid/{job.metric}": best["value"], **job.runtime},
        )
        card = models.write_model(job.folder / "model", job.net, card)
        oof = _predict_held_out(job, card)
        for views, predictions in oof.items():
            predictions.save(job.folder / "oof" / f"{views}.parquet")
        history = pd.DataFrame(job.progress.history)
        history.insert(0, "epoch", np.arange(len(history)))
        with atomic(job.folder / "history.csv") as temporary:
            history.to_csv(temporary, index=False)
        write_json(
            job.folder / "done.json",
            {"metrics": _oof_metrics(job, oof), "model_sha": card.model_sha, "views": list(oof)},
        )
        (job.folder / "checkpoint.pt").unlink(missing_ok=True)
    job.devices.wait()
    return read_result(job.folder)


def _oof_metrics(job: Job, oof: dict[str, Predictions]) -> dict[str, float]:
    """``oof/<metric>`` with the recipe's views, and ``oof.<views>/<metric>`` for each set nested in them."""
    rows = job.scored_rows
    truth, ids = job.target[rows], job.manifest.sample_ids[rows]
    metrics = {}
    for name in dict.fromkeys([job.metric, job.task.default_metric]):
        for views, predictions in oof.items():
            metrics[f"oof.{views}/{name}"] = job.task.score(predictions.take(ids).values, truth, name)
        metrics[f"oof/{name}"] = metrics[f"oof.{job.recipe.tta}/{name}"]
    return metrics


def _choose(job: Job) -> str:
    """Put the chosen weights into the network: the best epoch's, the last, or the averaged ones if they are better."""
    best, sign, start = job.progress.best, job.sign, job.recipe.average.start_epoch
    kept = "last" if job.recipe.select == "last" else "best"
    if job.recipe.average.kind == "swa" and not job.average.mean and job.devices.is_main:
        log.warning(
            "%s: nothing was averaged: it ended after %d epochs, before average.start_epoch %d; the %s epoch's weights"
            " are kept", job.name, len(job.progress.history), start, kept,
        )  # fmt: skip
    if job.recipe.average.kind == "swa" and job.average.mean:
        job.net.load_state_dict(job.average.mean)
        # Dropout is at work while BatchNorm counts: a resumed training must draw what a whole one draws.
        torch.manual_seed(seed_of(job.seed, len(job.recipe.phases)))
        with job.autocast():
            optim.refresh_statistics(job.net, _plain_batches(job), _averaged_part(job))
        value = validate(job, None)[f"valid/{job.metric}"]
        if job.recipe.select == "last" or sign * value >= sign * best["value"]:
            job.progress.best = best | {"value": value}
            return "swa"
    job.net.load_state_dict(best["weights"])
    return kept


def _averaged_part(job: Job) -> nn.Module:
    """What the averaged epochs trained. A trunk that was frozen in all of them keeps the statistics it ran with."""
    trains = {phase.name: phase.train for phase in job.recipe.phases}  # early_stop may have cut any of them short
    averaged = [trains[row["phase"]] for row in job.progress.history[job.recipe.average.start_epoch :]]
    return job.net if "all" in averaged else job.net.head


def _plain_batches(job: Job) -> Iterator[torch.Tensor]:
    """Training rows as validation would see them, shuffled (a manifest is often sorted by class), in equal batches."""
    rows = np.random.default_rng([job.seed, len(job.recipe.phases)]).permutation(job.train_rows)
    for some in chunks(rows[: len(rows) // VALID_BATCH * VALID_BATCH or len(rows)], VALID_BATCH):
        images = np.stack([job.cache.square(row) for row in some.tolist()])
        yield torch.from_numpy(images).to(job.devices.device).permute(0, 3, 1, 2)


def _predict_held_out(job: Job, card: models.ModelCard) -> dict[str, Predictions]:
    rows = job.held_out_rows
    if job.is_frozen:
        values = _predict_features(job, rows)
    else:
        squares = (np.stack([job.cache.square(row) for row in some.tolist()]) for some in chunks(rows, OOF_BATCH))
        values = predict_rows(job.net, card, squares, [job.cache.frames[row] for row in rows], job.recipe.tta)
    return {
        views: Predictions(
            sample_ids=job.manifest.sample_ids[rows],
            values=found,
            classes=job.manifest.classes,
            manifest_hash=card.manifest_hash,
            member=card.member,
            model_sha=card.model_sha,
            views=views,
            fold=np.full(len(rows), job.fold),
            seed=job.seed,
        )
        for views, found in values.items()
    }


def _predict_features(job: Job, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    """Predict rows from a frozen trunk's features, which other slots have computed already, or will not again."""
    job.net.eval()
    features = frozen_trunk(job).of_views(job.recipe.tta, rows)  # (V, n, F)
    with torch.inference_mode():
        inputs = torch.from_numpy(features).to(job.devices.device)
        outputs = np.stack([job.task.activate(job.net.head(view)).cpu().numpy().astype(np.float64) for view in inputs])
    views = zip(outputs, tta.VIEWS[job.recipe.tta], strict=True)
    undone = np.stack([job.task.undo(values, view) for values, view in views])
    found = {name: undone[:count].mean(axis=0).astype(np.float32) for name, count in nested(job.recipe.tta).items()}
    if job.task.name == "classify":
        return found
    return {name: to_pixels(points, [job.cache.frames[row] for row in rows]) for name, points in found.items()}


def read_result(folder: Path) -> SlotResult:
    """Read a finished slot back.

    Raises:
        UserError: it is not finished.
    """
    done = read_json(folder / "done.json", "a finished slot")
    oof = {views: Predictions.load(folder / "oof" / f"{views}.parquet") for views in done["views"]}
    return SlotResult(folder / "model", oof, pd.read_csv(folder / "history.csv"), done["metrics"])
