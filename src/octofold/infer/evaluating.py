"""Evaluation: Predictions and the truth become scores, tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold import plots
from octofold.data.images import PixelSpec, load
from octofold.data.manifest import Manifest, read
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic
from octofold.metrics import METRICS, confusion
from octofold.predictions import Predictions, average, concatenate

if TYPE_CHECKING:
    from octofold.plots import Figure

Array = npt.NDArray[Any]
WORST = 24  # pictures in the grid of the worst samples
THUMB = PixelSpec(192, "pad", 1.0)
BINS = 15  # of the reliability table, as metrics.calibration_error


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        split: ``oof`` (no model saw the row while training), ``apparent`` (they may have) or ``test`` (the data they
            trained on is at hand and holds none of these rows).
        metrics: score by row of `metrics.METRICS`.
        manifest: the labelled rows scored, in order.
        predictions: the same rows.
        loss: ``(N,)`` by which samples are called worst: negative log-likelihood in nats, or the mean distance of
            the points in px.
        tables: ``per_class`` (or ``per_point``), ``confusion``, ``reliability``, ``worst``.
    """

    split: str
    metrics: dict[str, float]
    manifest: Manifest
    predictions: Predictions
    loss: Array
    tables: dict[str, pd.DataFrame]

    def named(self) -> dict[str, float]:
        """Scores under their MLflow names, ``oof/accuracy``; the ones that are not defined here left out."""
        return {f"{self.split}/{name}": score for name, score in self.metrics.items() if np.isfinite(score)}


def gather(slots: Sequence[Predictions]) -> Predictions:
    """Join the OOF of a member's slots: folds of a seed one under the other, seeds averaged.

    Raises:
        UserError: two slots hold out the same sample with one seed, or seeds cover different samples.
    """
    seeds = sorted({slot.seed for slot in slots}, key=str)
    return average([concatenate([slot for slot in slots if slot.seed == seed]) for seed in seeds])


def evaluate(manifest: Manifest, predictions: Predictions) -> Evaluation:
    """Score predictions against the truth of a manifest.

    Rows are matched by sample id. Predictions for samples that the manifest does not have are an error; samples
    that nobody predicted are left out, and how many were scored is among the metrics (``rows``, ``coverage``).

    Raises:
        UserError: no truth in the manifest, another task or other classes, or samples the manifest does not know.
    """
    where = predictions.member or "predictions"
    if not manifest.is_labelled:
        raise UserError(
            manifest.file or "manifest", expected="labels", got="none: this is a test manifest",
            fix="evaluate against the training manifest, or record the score of a submission with `score`",
        )  # fmt: skip
    if predictions.is_points != (manifest.task == "keypoints"):
        raise UserError(
            where, expected=f"predictions of {manifest.task}", got="points" if predictions.is_points else "classes"
        )
    place = {name: row for row, name in enumerate(manifest.sample_ids.tolist())}
    unknown = [name for name in predictions.sample_ids.tolist() if name not in place]
    if unknown:
        raise UserError(
            where, expected=f"samples of {manifest.file or 'the manifest'}",
            got=f"{len(unknown)} it does not have: {preview(unknown)}", fix="give the manifest these samples come from",
        )  # fmt: skip
    if not len(predictions.sample_ids):
        raise UserError(where, expected="at least one row", got="none")
    kept = manifest.take(np.array([place[name] for name in predictions.sample_ids.tolist()]))
    predictions = predictions.reorder(manifest.classes)
    target, values = kept.target, predictions.values
    scores = {name: row.score(values, target) for name, row in METRICS.items() if row.task == manifest.task}
    scores |= {"rows": float(len(target)), "coverage": len(target) / len(place)}
    loss, tables = (_points if predictions.is_points else _classes)(kept, values, target)
    return Evaluation(_split(manifest, predictions), scores, kept, predictions, loss, tables)


def _split(manifest: Manifest, predictions: Predictions) -> str:
    """Name what a score is worth; ``test`` only where every manifest trained on is there to show that it held no row.

    Another hash alone proves nothing: cleaning makes a new version of nearly the same photos. Nor does the hash a blend
    was fitted on: its members may have trained on other versions.
    """
    if predictions.is_oof:
        return "oof"
    for hash_ in {predictions.manifest_hash, *predictions.extra.get("trained_on", [])}:
        trained = _version(manifest, hash_)
        if trained is None or np.isin(predictions.sample_ids, trained.sample_ids).any():
            return "apparent"
    return "test"


def _version(manifest: Manifest, hash_: str) -> Manifest | None:
    """The manifest of a hash: this one, or one kept by `prepare` beside it or under ``data/<competition>``."""
    if hash_ == manifest.hash:
        return manifest
    homes = [ROOT / "data" / manifest.competition, *([manifest.file.parent] if manifest.file else [])]
    files = [home / place for home in homes for place in ("manifest.csv", f"versions/{hash_[:12]}/manifest.csv")]
    return next((found for file in files if file.exists() and (found := read(file)).hash == hash_), None)


def _classes(manifest: Manifest, probs: Array, target: Array) -> tuple[Array, dict[str, pd.DataFrame]]:
    names, said = np.array(manifest.classes), probs.argmax(axis=1)
    loss = -np.log(np.clip(probs[np.arange(len(target)), target], 1e-7, 1))
    table = confusion(said, target, len(names))
    worst = np.argsort(-loss, kind="stable")
    return loss, {
        "per_class": _per_class(table, names, probs, target),
        "confusion": pd.DataFrame(table, index=pd.Index(names, name="truth \\ predicted"), columns=names),
        "reliability": _reliability(probs.max(axis=1), said == target),
        "worst": pd.DataFrame(
            {
                "sample_id": manifest.sample_ids[worst],
                "path": manifest.table["path"].to_numpy()[worst],
                "truth": names[target[worst]],
                "predicted": names[said[worst]],
                "truth_probability": probs[worst, target[worst]],
                "confidence": probs[worst].max(axis=1),
                "loss": loss[worst],
            }
        ),
    }


def _per_class(table: Array, names: Array, probs: Array, target: Array) -> pd.DataFrame:
    """Precision and recall of a class nobody named or that does not occur are NaN, not 0."""
    hits, truth, said = np.diag(table).astype(float), table.sum(axis=1), table.sum(axis=0)
    wrong = table * (1 - np.eye(len(names), dtype=table.dtype))
    top = wrong.argmax(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "class": names,
                "count": truth,
                "predicted": said,
                "precision": hits / said,
                "recall": hits / truth,
                "f1": 2 * hits / (truth + said),
                "mean_probability": [probs[target == k, k].mean() if truth[k] else np.nan for k in range(len(names))],
                "most_confused_with": [names[top[k]] if wrong[k, top[k]] else "" for k in range(len(names))],
                "confused": wrong.max(axis=1),
            }
        )


def _reliability(confidence: Array, hit: Array) -> pd.DataFrame:
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [place == number for number in range(BINS)]
    return pd.DataFrame(
        {
            "from": np.arange(BINS) / BINS,
            "to": (np.arange(BINS) + 1) / BINS,
            "rows": [int(bin.sum()) for bin in bins],
            "confidence": [confidence[bin].mean() if bin.any() else np.nan for bin in bins],
            "accuracy": [hit[bin].mean() if bin.any() else np.nan for bin in bins],
        }
    )


def _points(manifest: Manifest, points: Array, target: Array) -> tuple[Array, dict[str, pd.DataFrame]]:
    distance = np.linalg.norm(points - target, axis=2)  # (N, P), NaN where missing
    there = np.isfinite(distance)
    mean = np.where(there, distance, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    worst = np.argsort(-mean, kind="stable")
    rows = []
    for number, name in enumerate(manifest.classes):
        own = distance[there[:, number], number]
        rows.append(
            {
                "point": name,
                "count": len(own),
                "mean_px": own.mean() if len(own) else np.nan,
                "median_px": np.median(own) if len(own) else np.nan,
                "p95_px": np.quantile(own, 0.95) if len(own) else np.nan,
            }
        )
    return mean, {
        "per_point": pd.DataFrame(rows),
        "worst": pd.DataFrame(
            {
                "sample_id": manifest.sample_ids[worst],
                "path": manifest.table["path"].to_numpy()[worst],
                "mean_px": mean[worst],
                "points": there.sum(axis=1)[worst],
            }
        ),
    }


def figures(found: Evaluation) -> dict[str, "Figure"]:
    """Draw what the tables say: ``{file name: figure}``."""
    title = f"{found.predictions.member} ({found.split}, {found.predictions.views}, {int(found.metrics['rows'])} rows)"
    drawn = {"worst.png": _worst(found)}
    if found.predictions.is_points:
        table = found.tables["per_point"]
        drawn["per_point.png"] = plots.bar(
            list(table["point"]), table["mean_px"].to_numpy(), title, "mean distance, px"
        )
        return drawn
    drawn["confusion.png"] = plots.confusion(found.tables["confusion"].to_numpy(), found.manifest.classes, title)
    drawn["reliability.png"] = plots.reliability(found.tables["reliability"], title, found.metrics["ece"])
    return drawn


def _worst(found: Evaluation) -> "Figure":
    order = np.argsort(-found.loss, kind="stable")[:WORST]
    paths, target = found.manifest.paths, found.manifest.target
    images, captions, points = [], [], []
    for row in order.tolist():
        try:
            image, frame = load(paths[row], THUMB, str(found.manifest.sample_ids[row]))
        except UserError:  # moved or damaged since: the table still names it
            continue
        images.append(image)
        if found.predictions.is_points:
            captions.append(f"{paths[row].name}\n{found.loss[row]:.1f} px")
            both = {"truth": target[row], "predicted": found.predictions.values[row]}
            points.append({name: frame.to_unit(where) * THUMB.size - 0.5 for name, where in both.items()})
        else:
            names, probs = found.manifest.classes, found.predictions.values[row]
            said = f"{names[probs.argmax()]} {probs.max():.2f}"
            captions.append(f"{said}\ntruth: {names[target[row]]} {probs[target[row]]:.2f}")
    return plots.grid(images, captions, f"worst of {len(found.loss)}", points=points or None)


def write(found: Evaluation, folder: Path) -> dict[str, str]:
    """Write every table (CSV) and picture (PNG); return their paths by name."""
    paths = {}
    for name, table in found.tables.items():
        with atomic(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=name == "confusion", float_format="%.6g")
        paths[f"{name}_csv"] = str(folder / f"{name}.csv")
    for name, figure in figures(found).items():
        paths[name.removesuffix(".png") + "_png"] = str(plots.save(figure, folder / name))
    return paths
