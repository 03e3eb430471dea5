"""Profiling: a trace and a readable table when asked, nothing when not; event files, or how to get them."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

from octofold.errors import UserError
from octofold.train import profiling


def train(steps: int, tick: object) -> torch.nn.Module:
    net = torch.nn.Linear(4, 2)
    for _ in range(steps):
        net.zero_grad()
        net(torch.ones(8, 4)).sum().backward()
        tick()  # type: ignore[operator]
    return net


def test_a_trace_and_its_costliest_operators(tmp_path: Path) -> None:
    with profiling.profile(3, tmp_path / "profile") as tick:
        train(profiling.WARM_UP + 6, tick)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "aten::addmm" in names
    assert sum(name.startswith("ProfilerStep") for name in names) == 3
    assert "aten::addmm" in (tmp_path / "profile" / "operators.txt").read_text()


def test_unasked_it_leaves_nothing(tmp_path: Path) -> None:
    with profiling.profile(0, tmp_path / "profile") as tick, profiling.events(False, tmp_path / "events") as write:
        write(train(3, tick), {"train/loss": 1.0}, 0)
    assert not list(tmp_path.iterdir())


def test_events_hold_scalars_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with profiling.events(True, tmp_path) as write:
        for epoch in range(2):
            write(train(1, lambda: None), {"train/loss": 1.0 - epoch}, epoch)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in found.Scalars("train/loss")] == [1.0, 0.0]
    assert set(found.Tags()["histograms"]) == {
        f"{kind}/{name}" for kind in ("weight", "gradient") for name in ("weight", "bias")
    }


def test_without_tensorboard_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"), profiling.events(True, tmp_path):
        pass
