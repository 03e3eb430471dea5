"""Serving: one model with everything inside, the same probabilities, over HTTP too, and a fair succession."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from conftest import House
from labelled import make_manifest, make_oof
from octofold import metrics
from octofold.blend import lineup, succession
from octofold.blend.lineup import Lineup
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import read_json
from octofold.infer import ensemble, inference, looks, serving, shards
from octofold.infer.combining import Blend
from octofold.infer.inference import How
from octofold.predictions import Predictions
from octofold.track import registry, tracking, versions
from test_inference import CLASSES, checkpoint, photos


def slot(tmp_path: Path, member: str, fold: int, **card: Any) -> registry.Slot:
    """Register a packed tiny fold model."""
    folder = tmp_path / "made" / f"{member}{fold}"
    checkpoint(folder / "model", fold, member, **card)
    with tracking.run("train.slot", None, "tiny", tags={"member": member}) as run:
        return registry.register_slot(run, serving.pack_slot(folder / "model", folder))


@pytest.fixture
def whole(mlruns: Path, tmp_path: Path) -> Path:
    """A blend of two members (two folds, one fold; other sizes), as a folder."""
    slots = {"small": [slot(tmp_path, "small", f) for f in (0, 1)], "large": [slot(tmp_path, "large", 0, size=24)]}
    blend = Blend("simplex", "linear", np.array([0.3, 0.7]))
    shares = {"small": [0.25, 0.75], "large": [1.0]}
    return serving.write_blend(tmp_path / "blend", "tiny.blend", blend, slots, shares, "geo4", "m" * 64, {"note": 1})


def test_a_blend_on_disk_says_what_its_parts_say(whole: Path, tmp_path: Path) -> None:
    items = looks.find(photos(tmp_path / "in")[0].parent).items
    crew = ensemble.load(whole)
    assert crew.views == "geo4"
    assert crew.name == "tiny.blend"
    blended = next(inference.stream(crew, items, How("geo4"))).values
    about = read_json(whole / "blend.json")
    expected = np.zeros_like(blended, dtype=np.float64)
    for member, weight in zip(about["members"], (0.3, 0.7), strict=True):
        for part in member["slots"]:
            alone = next(inference.stream(ensemble.load(whole / part["folder"]), items, How("geo4"))).values
            expected += weight * part["share"] * alone
    np.testing.assert_allclose(blended, expected, atol=1e-6)


def test_a_blend_is_found_from_any_folder_above_it_and_never_taken_apart(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "dl" / "model" / "artifacts" / "blend")
    for place in ("dl", "dl/model", "dl/model/artifacts", "dl/model/artifacts/blend"):
        crew = ensemble.load(tmp_path / place)
        assert (crew.name, crew.views) == ("tiny.blend", "geo4")
        assert crew.combine is not None
    checkpoint(tmp_path / "dl" / "other", 0)
    with pytest.raises(UserError, match="artifacts/blend, and 1 models beside"):
        ensemble.load(tmp_path / "dl")
    shutil.rmtree(tmp_path / "dl" / "other")
    shutil.copytree(whole, tmp_path / "dl" / "second")
    with pytest.raises(UserError, match="expected: one blend"):
        ensemble.load(tmp_path / "dl")


def test_what_a_mixed_blend_says_names_all_that_its_members_trained_on(
    mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    slots = {name: [slot(tmp_path, name, 0, manifest_hash=name[0] * 64)] for name in ("old", "new")}
    blend, shares = Blend("equal", "linear", np.array([0.5, 0.5])), {"old": [1.0], "new": [1.0]}
    folder = serving.write_blend(tmp_path / "b", "tiny.blend", blend, slots, shares, "none", "n" * 64)
    source = looks.find(photos(tmp_path / "in", 3)[0].parent)
    result = shards.run(ensemble.load(folder), source, How("none"), progress=False)
    assert result is not None
    said = Predictions.load(result.predictions.save(tmp_path / "p.parquet"))
    assert said.extra["trained_on"] == ["n" * 64, "o" * 64]


def test_class_wise_rules_keep_the_order_they_were_fitted_in(mlruns: Path, tmp_path: Path) -> None:
    slots, order = {"small": [slot(tmp_path, "small", 0)]}, (*CLASSES[1:], CLASSES[0])
    blend = Blend("equal", "linear", np.array([1.0]))
    folder = serving.write_blend(
        tmp_path / "b", "tiny.blend", blend, slots, {"small": [1.0]}, "none", "m" * 64, classes=order
    )
    items = looks.find(photos(tmp_path / "in")[0].parent).items
    crew, alone = (
        ensemble.load(folder),
        ensemble.load(folder / read_json(folder / "blend.json")["members"][0]["slots"][0]["folder"]),
    )
    assert crew.classes == order
    said, own = (next(inference.stream(one, items, How("none"))).values for one in (crew, alone))
    np.testing.assert_allclose(said, own[:, [CLASSES.index(name) for name in order]], atol=1e-6)


def test_rows_held_out_of_a_model_of_other_data_are_those_of_its_oof(mlruns: Path, tmp_path: Path) -> None:
    table, truth = make_manifest(tmp_path / "world")
    one = slot(tmp_path, "small", 0)
    mine = Lineup({"small": [one]}, np.zeros((1, len(truth), 3)), [], table, "none")
    np.testing.assert_array_equal(lineup.held_rows(mine, one), table.fold == 0)  # nothing better is known
    stored = make_oof(table, truth).take(table.sample_ids[[3, 5]].tolist()).save(tmp_path / "none.parquet")
    tracking.client().log_artifact(one.run_id, str(stored), "oof")
    assert np.flatnonzero(lineup.held_rows(mine, one)).tolist() == [3, 5]
    same = replace(one, manifest_hash=table.hash)
    np.testing.assert_array_equal(lineup.held_rows(mine, same), table.fold == 0)
    per_fold = {"1": [0.25], "2": [0.75]}  # of a fold that has no rows here: the mean
    assert [part.tolist() for part in lineup.shares(mine, "equal", per_fold)] == [[1.0]]


def test_replaced_weights_in_a_blend_are_noticed(whole: Path) -> None:
    first, second, *_ = sorted((whole / "slots").iterdir())
    shutil.rmtree(first)
    shutil.copytree(second, first)
    with pytest.raises(UserError, match="weights with sha256"):
        ensemble.load(whole)


def test_shares_must_fit(mlruns: Path, tmp_path: Path) -> None:
    slots = {"small": [slot(tmp_path, "small", 0)]}
    with pytest.raises(UserError, match="1 shares that sum to 1"):
        serving.write_blend(
            tmp_path / "b", "tiny.blend", Blend("equal", "linear", np.ones(1)), slots, {"small": [0.5]}, "none", "m"
        )


def test_a_packed_slot_is_an_mlflow_model_and_still_a_checkpoint(mlruns: Path, tmp_path: Path) -> None:
    made = slot(tmp_path, "small", 0)
    stored = tracking.fetch_uri(f"models:/{made.name}/{made.version}", "the slot")
    assert (stored / "MLmodel").exists()
    assert not list(stored.rglob("*.pkl"))  # no pickle anywhere
    text = (stored / "requirements.txt").read_text()
    assert "torch==" in text
    assert "safetensors==" in text
    assert all("==" in line for line in text.split())
    assert registry.fetch(made) == next(stored.glob("artifacts/*"))
    assert ensemble.load(stored).voices[0].card.member == "small"


@pytest.fixture
def rows(tmp_path: Path) -> Manifest:
    """Forty labelled samples."""
    table = pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(40)],
            "path": "x.png",
            "label": [CLASSES[i % 3] for i in range(40)],
            "group": "",
            "fold": [i % 5 for i in range(40)],
        }
    )
    return Manifest(table, "classify", CLASSES, "tiny", tmp_path)


def says(rows: Manifest, right: int) -> Predictions:
    """Out-of-fold predictions of which so many are right."""
    target = np.where(np.arange(40) < right, rows.target, (rows.target + 1) % 3)
    values = np.full((40, 3), 0.1) + 0.7 * np.eye(3)[target]
    return Predictions(rows.sample_ids, values, CLASSES, rows.hash, "blend", "w", "none", rows.fold)


def test_only_a_separable_gain_takes_production(whole: Path, rows: Manifest, tmp_path: Path) -> None:
    packed = serving.pack(whole, tmp_path / "packed")

    def challenge(right: int, force: bool = False) -> succession.Decision:
        with tracking.run("blend", None, "tiny") as run:
            oof = says(rows, right)
            run.log_artifact(oof.save(tmp_path / "none.parquet"), "oof")
            name, version = serving.log_blend(run, packed, {"note": str(right)})
            assert name == "tiny.blend"
            found = succession.succeed(run, name, version, "production", oof, rows, metrics.METRICS["accuracy"], force)
        assert tracking.get_run(run.id).tags["succession.moved"] == str(found.moved).lower()
        return found

    def stands() -> int:
        return int(versions.registered_model("tiny.blend").aliases["production"])

    assert challenge(20).moved  # the first
    assert stands() == 1
    better = challenge(21)  # one row more is luck
    assert not better.moved
    assert "not separable" in better.reason
    assert stands() == 1
    assert challenge(36).moved
    assert stands() == 3
    assert not challenge(10).moved  # separable, downwards
    assert challenge(10, force=True).reason.startswith("forced")
    assert stands() == 5
    crew = ensemble.load(tracking.fetch_uri("models:/tiny.blend@production", "the blend"))
    assert crew.about["extra"] == {"note": 1}


@pytest.mark.parametrize("shared", ["row", "group"])
def test_what_one_row_or_group_says_takes_no_production(
    whole: Path, rows: Manifest, tmp_path: Path, shared: str
) -> None:
    """The blend in place knows nothing but one of these rows, or all of them are of one group; there it errs."""
    packed = serving.pack(whole, tmp_path / "packed")
    if shared == "group":
        rows = replace(rows, table=rows.table.assign(group="one"))
    found = []
    for oof in (says(rows, 0).take(rows.sample_ids[: 1 if shared == "row" else 40]), says(rows, 1)):
        with tracking.run("blend", None, "tiny") as run:
            run.log_artifact(oof.save(tmp_path / "none.parquet"), "oof")
            name, version = serving.log_blend(run, packed, {})
            found.append(succession.succeed(run, name, version, "production", oof, rows, metrics.METRICS["accuracy"]))
    assert [decision.moved for decision in found] == [True, False]
    assert "1 of the same groups, and 10 are needed" in found[1].reason


def test_a_cell_may_be_base64_but_never_a_path(whole: Path, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    from octofold.infer.served import Served

    model = Served()
    model.load_context(cast(Any, SimpleNamespace(artifacts={"model": whole})))
    path = photos(tmp_path / "in", 1)[0]
    raw = path.read_bytes()
    text = base64.encodebytes(raw)  # with line breaks
    said = model.predict(None, pd.DataFrame({"image": [raw, bytearray(raw), text, text.decode()]}))
    np.testing.assert_array_equal(said.to_numpy(), np.broadcast_to(said.to_numpy()[0], said.shape))
    noise = base64.b64encode(b"no image at all").decode()
    for bad in (str(path), str(path).encode(), base64.b64encode(str(path).encode()), noise, raw[:-9], "é", "", 5, None):
        with pytest.raises(MlflowException, match="image 1"):
            model.predict(None, pd.DataFrame({"image": [raw, bad]}))


def answer(address: str, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    """Post images to a served model; return the status and the body."""
    body = json.dumps(body) if kind == "application/json" else body
    request = urllib.request.Request(f"{address}/invocations", body.encode(), {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def served(whole: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a server that has nothing but the packed blend: no registry, another place."""
    folder = serving.pack(whole, tmp_path / "somewhere else" / "packed")
    shutil.rmtree(whole)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    away = tmp_path / "away"
    away.mkdir()
    environment = House(away).environment() | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        [*command, "-h", "127.0.0.1", "-p", str(port)], cwd=away, env=environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
        log.close()


@pytest.mark.slow
def test_real_photos_over_http(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Photos as a camera wrote them, by HTTP, give the probabilities that infer writes."""
    try:
        source = sorted((request.getfixturevalue("grocery15") / "test").glob("*.jpg"))[:10]
    except pytest.skip.Exception:
        source = photos(tmp_path / "in", 10)
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in source:
        shutil.copy(path, folder)
    items = looks.find(folder).items
    batches = list(inference.stream(ensemble.load(whole), items, How("geo4", 3)))
    expected = np.concatenate([batch.values for batch in batches])
    address = request.getfixturevalue("served")
    cells = [base64.b64encode(item.path.read_bytes()).decode() for item in items]

    def split(*images: str) -> dict[str, Any]:
        return {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}

    table = "\n".join(["image", *cells])
    for body, kind in (
        (split(*cells), "application/json"),
        ({"dataframe_records": [{"image": cell} for cell in cells]}, "application/json"),
        ({"instances": [{"image": cell} for cell in cells]}, "application/json"),
        ({"inputs": {"image": cells}}, "application/json"),
        (table, "text/csv"),
    ):
        status, found = answer(address, body, kind)
        assert status == 200, found
        said = pd.DataFrame(found["predictions"])
        assert tuple(said.columns) == CLASSES
        np.testing.assert_allclose(said.to_numpy(), expected, atol=1e-5)
    for bad in (base64.b64encode(b"no image").decode(), "/etc/passwd", "L2V0Yy9wYXNzd2Q="):
        for body in (split(cells[0], bad), {"instances": [{"image": cells[0]}, {"image": bad}]}):
            status, text = answer(address, body)
            assert status == 400, text  # the second is no base64 of an image, the third a path in base64
            assert "root:" not in str(text)


@pytest.mark.slow
def test_models_are_looked_up_in_our_store_without_anything_else_asked_before(mlruns: Path, tmp_path: Path) -> None:
    made = slot(tmp_path, "small", 0)
    program = f"from octofold.track import tracking; print(tracking.fetch_uri('models:/{made.name}/1', 'it'))"
    environment = House(mlruns.parent).environment()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip().splitlines()[-1], "MLmodel").exists()
