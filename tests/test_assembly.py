"""The blend as a person runs it: registered fold models in, submission, ledger, estimate and one model out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import REPOSITORY, House
from octofold.predictions import Predictions
from world import make_world

pytestmark = pytest.mark.slow

SETUP = """
import sys, json
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
sys.path.insert(0, "{tests}")
from world import make_world, CLASSES
from octofold import recipe, tta
from octofold.track import registry, tracking, versions
from octofold.data.manifest import Manifest
from octofold.nets.models import ModelCard, build, write_model
from octofold.files import ROOT

folder = ROOT / "data" / "tiny"
train = make_world(folder)
images = folder / "test"
images.mkdir()
picture = torch.from_numpy(np.array(Image.open(train.paths[7]))).permute(2, 0, 1)
rows = []
for number, view in enumerate(tta.VIEWS["geo8"]):
    turned = tta.apply(picture, view).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(turned).save(images / f"turn{{number}}.png")
    name = f"turn{{number}}.png"
    rows.append({{"sample_id": f"t{{number}}", "path": name, "names": json.dumps([name])}})
lines = ["image,label"] + [f"turn{{n}}.png,ash" for n in (5, 1, 0, 2, 3, 4, 7, 6)]
(folder / "sample.csv").write_text("\\n".join(lines) + "\\n")
info = {{"sample_submission": "sample.csv", "image_column": "image", "label_column": "label"}}
Manifest(pd.DataFrame(rows), "classify", CLASSES, "tiny", images, info).save(folder / "test.csv")
torch.manual_seed(0)
for member in ("a", "b", "old"):
    for fold in train.folds:
        plan = recipe.Recipe(member=member, model=recipe.Model(name="small_cnn", weights="none", input_size=20))
        net = build(plan.model, 3)
        hash_ = train.hash if member != "old" else "0" * 64
        card = ModelCard(plan.model_dump(mode="json"), "classify", CLASSES, "tiny", member, fold, 0, hash_)
        place = Path("{scratch}") / f"{{member}}{{fold}}"
        write_model(place, net, card)
        with tracking.run("train.slot", None, "tiny") as run:
            slot = registry.register_slot(run, place)
        versions.set_alias(slot.name, "staging" if member == "old" else "production", slot.version)
        if member != "old":
            versions.set_alias(slot.name, "staging", slot.version)
"""

TOUR = """
import sys, json
sys.path.insert(0, "{entrypoints}")
import blend, compare, explain, score
from octofold import commands, config
from octofold.errors import UserError
from octofold.track import tracking

def run(module, schema, **values):
    try:
        return module.run(config.build(schema, values, "test"))
    except UserError as error:
        return {{"refused": str(error)}}

B = dict(competition="tiny", register_model=False)
other = run(blend, commands.Blend, **B, method="simplex", tta="auto", members=["b"])
print(json.dumps({{
    "other": other,
    "kept": sorted(tracking.list_artifacts(other["run_id"], "oof")),
    "mixed": run(blend, commands.Blend, **B, stage="staging"),
    "unknown": run(blend, commands.Blend, **B, members=["zed"]),
    "metric": run(blend, commands.Blend, **B, metric="mse"),
    "compare": run(compare, commands.Compare, submission=str(other["submission"]), other="{first}"),
    "explain": run(explain, commands.Explain, submission="{first}", image="turn3.png"),
    "score": run(score, commands.Score, submission="{first}", public=0.4, private=0.5),
}}, default=str))
"""


def script(house: House, text: str) -> str:
    """Run Python text in a house; its last line of stdout."""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=house.home, env=house.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.fixture(scope="module")
def blended(shared_house: House) -> tuple[House, dict[str, Any]]:
    """A house with two registered members, blended once with geo8; no OOF is stored, so it has to be made."""
    scratch = shared_house.home / "scratch"
    script(shared_house, SETUP.format(tests=REPOSITORY / "tests", scratch=scratch))
    return shared_house, shared_house.run("blend", "--competition", "tiny", "--tta", "geo8").result


@pytest.fixture(scope="module")
def tour(blended: tuple[House, dict[str, Any]]) -> dict[str, Any]:
    """What the neighbouring entry points say, in one process."""
    house, result = blended
    text = TOUR.format(entrypoints=REPOSITORY / "entrypoints", first=result["submission"])
    found: dict[str, Any] = json.loads(script(house, text))
    return found


def test_submission_is_in_the_samples_order(blended: tuple[House, dict[str, Any]]) -> None:
    _, result = blended
    table = pd.read_csv(result["submission"])
    assert table["image"].tolist() == [f"turn{n}.png" for n in (5, 1, 0, 2, 3, 4, 7, 6)]
    assert 0 <= result["estimate/low"] <= result["estimate/accuracy"] <= result["estimate/high"] <= 1
    assert sum(result["weights"].values()) == pytest.approx(1, abs=1e-3)


def test_geo8_does_not_care_how_the_image_is_turned(blended: tuple[House, dict[str, Any]]) -> None:
    _, result = blended
    values = Predictions.load(result["predictions"]).values
    assert len(values) == 8
    np.testing.assert_allclose(values, np.broadcast_to(values[0], values.shape), atol=1e-6)


def test_the_run_holds_what_the_blend_is_made_of(blended: tuple[House, dict[str, Any]]) -> None:
    house, result = blended
    text = f"""
import json
from octofold.track import tracking
info = tracking.get_run("{result["run_id"]}")
models = json.loads(tracking.download(info.id, "models.json").read_text())
files, said = sorted(tracking.list_artifacts(info.id)), [info.tags["method"], info.tags["estimate.of"]]
print(json.dumps([sorted(info.metrics), files, models, *said]))
"""
    metrics, files, models, method, of = json.loads(script(house, text))
    assert {"oof/accuracy", "apparent/accuracy", "estimate/accuracy", "member/a", "member/b"} <= set(metrics)
    assert {"weights.png", "scores.png", "submission.csv", "ledger.parquet", "report.txt"} <= set(files)
    assert (method, of) == ("lr_mse", "test")
    assert len(models) == 6
    assert {"name", "version", "sha256", "run_id"} <= set(models[0])
    assert result["model"].startswith("models:/tiny.blend/")


def test_auto_views_and_other_members(tour: dict[str, Any]) -> None:
    assert tour["other"]["views"] in ("none", "flip", "geo4", "geo8")
    assert list(tour["other"]["weights"]) == ["b"]
    assert tour["kept"] == [f"oof/{tour['other']['views']}.parquet"], "registered or not, it may be one of the finals"


def test_refusals_name_the_member_and_the_way_out(tour: dict[str, Any]) -> None:
    assert "member 'old'" in tour["mixed"]["refused"]
    assert "--mixed" in tour["mixed"]["refused"]
    assert "zed" in tour["unknown"]["refused"]
    assert "accuracy" in tour["metric"]["refused"]


def test_compare_explain_score(tour: dict[str, Any]) -> None:
    assert tour["compare"]["rows"] == 8
    assert Path(tour["compare"]["differences"]).exists()
    assert Path(tour["explain"]["picture"]).stat().st_size > 1000
    assert tour["explain"]["row"]["label"] in ("ash", "birch", "cedar")
    assert tour["score"]["boards/submissions"] == 1


def test_an_error_by_size_of_a_single_point_is_refused(house: House, refuses: Any) -> None:
    make_world(house.home / "data" / "tips", task="keypoints")
    refuses(house.run("blend", "--competition", "tips", "--metric", "nme"), "two visible points or more")


def test_an_empty_stage_is_told(blended: tuple[House, dict[str, Any]], refuses: Any) -> None:
    house, _ = blended
    refuses(house.run("blend", "--competition", "nowhere"), "manifest")
