"""Distillation: the teacher's rows meet the manifest's by id and class, the loss is what it says, a student learns."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.predictions import Predictions
from octofold.recipe import Distill, Recipe
from octofold.track import tracking, versions
from octofold.train import distill, training
from test_inference import photos

CLASSES = ("ant", "bee", "cow")


def manifest(folder: Path, count: int = 12) -> Manifest:
    """Labelled small photos in three folds."""
    paths = photos(folder, count)
    table = pd.DataFrame(
        {
            "sample_id": [f"s{row}" for row in range(count)],
            "path": [path.name for path in paths],
            "label": [CLASSES[row % 3] for row in range(count)],
            "group": "",
            "fold": [row % 3 for row in range(count)],
        }
    )
    return Manifest(table, "classify", CLASSES, "tiny", folder)


def teacher(rows: Manifest, keep: int = 99, fold: bool = True) -> Predictions:
    """Out-of-fold probabilities in another order of rows and classes."""
    order = np.random.default_rng(0).permutation(len(rows.table))[:keep]
    values = np.random.default_rng(1).dirichlet(np.ones(3), len(order))
    held = rows.fold[order] if fold else None
    return Predictions(rows.sample_ids[order], values, CLASSES[::-1], rows.hash, "blend", "w", "none", held)


def test_soft_targets_are_matched_by_id_and_class(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "in")
    said = teacher(rows, keep=9)
    config = Distill(teacher=str(said.save(tmp_path / "t.parquet")))
    soft = distill.read_teacher(config, rows, np.arange(12))
    assert np.isnan(soft).any(axis=1).sum() == 3  # of whom the teacher said nothing
    for name, values in zip(said.sample_ids, said.values, strict=True):
        np.testing.assert_array_equal(soft[int(name[1:])], values[::-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said, rows: teacher(rows, fold=False), "out-of-fold"),
        (lambda said, rows: said.take([]), "some of the training rows"),
    ],
)
def test_teachers_that_would_leak_or_know_nothing_are_refused(tmp_path: Path, change: object, words: str) -> None:
    rows = manifest(tmp_path / "in", 6)
    said = change(teacher(rows), rows)  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        distill.read_teacher(Distill(teacher=str(said.save(tmp_path / "t.parquet"))), rows, np.arange(6))


def test_the_loss_is_smallest_where_student_and_teacher_agree() -> None:
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    config = Distill(teacher="x", share=1.0, temperature=3.0)
    same = soft.log().requires_grad_()

    def nine(rows: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tensor(9.0)

    ones = torch.ones(2)
    distill.teach(nine, same, soft, ones, config).backward()  # type: ignore[no-untyped-call]
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6
    assert distill.teach(nine, torch.zeros(2, 3), soft, ones, Distill(teacher="x", share=0.0)) == 9
    unknown = torch.full((2, 3), torch.nan)
    assert distill.teach(nine, torch.zeros(2, 3), unknown, ones, config) == 9
    half = torch.stack([soft[0], unknown[0]])  # a row the teacher does not know counts by its label
    mixed = distill.teach(nine, torch.zeros(2, 3), half, ones, config)
    alone = distill.teach(nine, torch.zeros(1, 3), soft[:1], ones[:1], config)
    assert mixed == pytest.approx(float(9 + alone) / 2)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.1, 1.0, 0.5])])
def test_a_row_without_a_teacher_weighs_as_much_as_one_with(weight: torch.Tensor | None) -> None:
    """A row's own share is mixed, not the batch's: the mean over rows is the same however they are put together."""
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [torch.nan] * 3])
    logits, target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([0, 2, 1])
    config = Distill(teacher="x", share=0.6)
    counts = torch.ones(3) if weight is None else weight[target]

    def loss(rows: list[int]) -> torch.Tensor:
        def labels(known: torch.Tensor | None = None) -> torch.Tensor:
            some = rows if known is None else torch.tensor(rows)[known]
            return torch.nn.functional.cross_entropy(logits[some], target[some], weight)

        return distill.teach(labels, logits[rows], soft[rows], counts[rows], config)

    each = torch.stack([loss([0]), loss([1]), loss([2])])
    torch.testing.assert_close(loss([0, 1, 2]), (counts * each).sum() / counts.sum())


def test_a_teacher_in_doubt_drives_no_row_away_from_its_label() -> None:
    logits, target = torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 1])
    soft, weight = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]]), torch.tensor([0.1, 1.0])

    def labels(known: torch.Tensor | None = None) -> torch.Tensor:
        some = slice(None) if known is None else known
        return torch.nn.functional.cross_entropy(logits[some], target[some], weight)

    distill.teach(labels, logits, soft, weight, Distill(teacher="x")).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0


def test_mixing_images_beside_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="mixup_prob and cutmix_prob must be 0"):
        Recipe.model_validate({"distill": {"teacher": "x"}, "augment": {"mixup_prob": 0.5, "mixup_alpha": 0.2}})


def test_the_blend_in_production_is_the_oof_of_its_run(mlruns: Path, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "in", 6)
    with tracking.run("blend", None, "tiny") as run:
        run.log_artifact(teacher(rows).save(tmp_path / "geo8.parquet"), "oof")
    versions.ensure_registered("tiny.blend", {})
    made = tracking.client().create_model_version("tiny.blend", f"{run.artifact_uri}/model", run_id=run.id)
    versions.set_alias("tiny.blend", "production", int(made.version))
    for address in ("models:/tiny.blend@production", "models:/tiny.blend/1", f"runs:/{run.id}/oof/geo8.parquet"):
        assert Predictions.load(distill.find_teacher(address)).member == "blend"
    for address in ("models:/tiny.blend@staging", "models:/tiny.blend", "models:/tiny.blend/7", "nowhere.parquet"):
        with pytest.raises(UserError):
            distill.find_teacher(address)


def test_a_student_follows_its_teacher_against_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teacher calls every sample a cow; with share 1 the labels are not heard at all."""
    monkeypatch.setattr("octofold.data.images.ROOT", tmp_path)
    monkeypatch.setattr("octofold.train.calibration.ROOT", tmp_path, raising=False)
    rows = manifest(tmp_path / "in")
    cow = np.tile(np.array([[0.02, 0.02, 0.96]], np.float32), (12, 1))
    said = Predictions(rows.sample_ids, cow, CLASSES, rows.hash, "blend", "w", "none", rows.fold)
    recipe = Recipe.model_validate(
        {
            "model": {"name": "small_cnn", "input_size": 16},
            "augment": {"preset": "none"},
            "phases": [{"epochs": 12}],
            "batch_size": 4,
            "tta": "none",
            "select": "last",
            "optim": {"lr": 3e-3},
            "distill": {"teacher": str(said.save(tmp_path / "t.parquet")), "share": 1.0, "temperature": 1.0},
            "runtime": {"device": "cpu", "precision": "fp32", "channels_last": "off", "compile": "off"},
        }
    )
    done = training.train_slot(recipe, rows, 0, 0, tmp_path / "work", lambda epoch, metrics: None)
    assert (done.oof["none"].values.argmax(axis=1) == 2).all()
