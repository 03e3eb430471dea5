"""A pair expert from the recipe to the submission, on digits: trained, promoted, found, gated, served. No hand work."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from conftest import REPOSITORY, House
from octofold.data import manifest
from octofold.metrics import accuracy, confusion
from octofold.predictions import Predictions, concatenate

pytestmark = pytest.mark.slow

WEAK = """
member: weak
model: {name: simple_cnn, input_size: 16}
augment: {preset: none}
optim: {lr: 1.0e-3}
phases: [{name: scratch, epochs: 1}]
batch_size: 64
select: last
tta: none
"""


def test_a_pair_expert_reaches_the_submission_by_itself(house: House) -> None:
    table = Path(
        house.run("prepare", "--competition", "digits", "--builtin", "digits", "--folds", 2).result["manifest"]
    )
    (house.home / "weak.yaml").write_text(WEAK)
    shared = ("--manifest", table, "--stage", "production", "--parallel", 1)
    assert house.run("train", *shared, "--config", house.home / "weak.yaml").code == 0
    rows = manifest.read(table)
    files = sorted((house.home / "mlruns" / "artifacts").rglob("oof/none.parquet"))
    oof = concatenate([Predictions.load(file) for file in files]).take(rows.sample_ids)
    errors = confusion(oof.values.argmax(axis=1), rows.target, 10)
    a, b = max(itertools.combinations(range(10), 2), key=lambda pair: errors[pair] + errors[pair[::-1]])
    expert = ("--config", REPOSITORY / "configs/digits/pair.yaml", "--member", "expert", "--tta", "none")
    trained = house.run("train", *shared, *expert, "--classes", f"{rows.classes[a]},{rows.classes[b]}").result
    assert trained["oof/accuracy"] > 0.5  # on its two classes, as its slots say: over all ten it could reach 0.2
    found = house.run("blend", "--competition", "digits", "--tta", "none", "--method", "equal").result
    assert found["weights"] == {"weak": 1.0, "expert": 0.0}
    report = Path(found["report"]).read_text()
    assert f"Expert expert for {rows.classes[a]} and {rows.classes[b]} is heard where they lead by at most" in report
    assert found["oof/accuracy"] > accuracy(oof.values, rows.target)
    served = house.run("infer", "--model", found["model"], "--images", rows.file.parent / "test.csv").result
    again, first = Predictions.load(served["predictions"]), Predictions.load(found["predictions"])
    np.testing.assert_allclose(again.take(first.sample_ids).values, first.values, atol=1e-5)
