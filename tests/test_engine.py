"""Engines: each equals eager float32, the choice is remembered, a wrong one is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from octofold.errors import UserError
from octofold.nets import engine
from octofold.nets.models import build
from octofold.recipe import Model

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the openvino extra")
HERE = [
    pytest.param(
        name, marks=[needs_openvino] if name == "openvino" else [pytest.mark.slow] if name == "compile" else []
    )
    for name in engine.ENGINES
]


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    made = build(Model(name="small_cnn", input_size=24), 5).eval()
    with torch.no_grad():
        list(made.head.parameters())[0].mul_(10)
    return made


@pytest.fixture
def images() -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", HERE)
def test_every_engine_equals_eager(name: str, net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "compile":  # graph capture and padding are ours to test; the two minutes of C++ are not
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = engine.reference(net, images, softmax)
    forward = engine.make(net, "x", images, softmax, 1, engine=name)
    assert engine.difference(forward, images, softmax, plain) <= engine.EXACT
    for part in (images[:1], images[2:5]):  # batches of other sizes
        np.testing.assert_allclose(softmax(forward(part)), engine.reference(net, part, softmax), atol=engine.EXACT)


@needs_openvino
def test_openvino_takes_batches_laid_out_in_any_way(net: nn.Module, images: Tensor) -> None:
    forward = engine.OpenVino(net)
    plain = engine.reference(net, images, softmax)
    np.testing.assert_allclose(softmax(forward(images.contiguous())), plain, atol=engine.EXACT)
    turned = images.transpose(-2, -1)
    np.testing.assert_allclose(softmax(forward(turned)), engine.reference(net, turned, softmax), atol=engine.EXACT)


@needs_openvino
def test_openvino_answers_several_threads_each_its_own(net: nn.Module) -> None:
    forward = engine.OpenVino(net)
    pixels = np.random.default_rng(1).integers(0, 255, (40, 24, 24, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    plain = engine.reference(net, images, softmax)
    assert float((plain[1:] - plain[:-1]).abs().max()) > 100 * engine.EXACT  # rows put in another's place would show
    parts = [slice(start, start + 1 + start % 7) for start in range(33)]
    with ThreadPoolExecutor(3) as pool:
        for part, logits in zip(parts, pool.map(lambda part: forward(images[part]), parts), strict=True):
            np.testing.assert_allclose(softmax(logits), plain[part], atol=engine.EXACT)


@pytest.mark.parametrize("name", ["eager", pytest.param("openvino", marks=needs_openvino)])
def test_bf16_is_near_but_need_not_be_exact(name: str, net: nn.Module, images: Tensor) -> None:
    plain = engine.reference(net, images, softmax)
    forward = engine.make(net, "x", images, softmax, 1, engine=name, precision="bf16")
    assert engine.difference(forward, images, softmax, plain) < 0.1


def lying(by: float) -> Any:
    """An engine that is off by a little."""

    class Lying(engine.Eager):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) + torch.tensor([by, 0, 0, 0, 0])

    return lambda net, precision: Lying(net, precision)


def test_an_engine_that_is_not_exact_is_refused(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.ENGINES, "openvino", lying(1e-3))
    with pytest.raises(UserError, match="probabilities to 1e-05"):
        engine._exact(net, "openvino", images, softmax, "fp32")


def test_an_engine_that_cannot_run_the_network_is_a_clear_error(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(net: nn.Module, precision: str) -> engine.Forward:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setitem(engine.ENGINES, "compile", cannot)
    with pytest.raises(UserError, match="no such operator"):
        engine.make(net, "x", images, softmax, 1, engine="compile")
    assert engine._measure(net, "compile", images, softmax, "fp32") is None


@needs_openvino
def test_the_choice_is_measured_once_and_remembered(
    net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WORTH_S", 0.0)
    monkeypatch.setattr(engine, "COMPILE_WORTH_S", 1e9)
    notes = tmp_path / "engines.json"
    chosen = engine.make(net, "tiny 24 px", images, softmax, 10_000_000, notes=notes)
    (key, table), *_ = json.loads(notes.read_text()).items()
    assert key.startswith("tiny 24 px|fp32|batch 6|")
    assert set(table) == {"eager", "channels_last", "openvino"}
    assert all(found["difference"] <= engine.EXACT for found in table.values())
    measured: list[str] = []
    monkeypatch.setattr(engine, "_measure", lambda net, name, *rest: measured.append(name))
    again = engine.make(net, "tiny 24 px", images, softmax, 10_000_000, notes=notes)
    assert not measured
    assert type(again) is type(chosen)
    # a table that praises an engine which is wrong for these weights: the next best is taken
    praised = {key: {**table, "openvino": {"image_ms": 0.0, "build_s": 0.0, "difference": 0.0}}}
    notes.write_text(json.dumps(praised))
    monkeypatch.setitem(engine.ENGINES, "openvino", lying(1e-3))
    assert type(engine.make(net, "tiny 24 px", images, softmax, 10_000_000, notes=notes)) is engine.Eager


def test_small_jobs_are_not_measured(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    forward = engine.make(net, "x", images, softmax, 8, notes=tmp_path / "engines.json")
    assert isinstance(forward, engine.Eager)
    first = (tmp_path / "engines.json").read_text()
    assert [list(table) for table in json.loads(first).values()] == [[engine.FIRST_LOOK]]
    assert type(engine.make(net, "x", images, softmax, 8, notes=tmp_path / "engines.json")) is engine.Eager
    assert (tmp_path / "engines.json").read_text() == first  # the same job chooses by the same number, not by the clock


def test_unknown_engine(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError, match="one of channels_last"):
        engine.make(net, "x", images, softmax, 8, engine="warp")
