"""Parts of a big job, made side by side by several processes, are the bytes one process makes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octofold import compute, files, recipe
from octofold.commands import Infer
from octofold.errors import UserError
from octofold.infer import crews, looks, results, shards
from octofold.nets import models
from octofold.workers import Job
from world import CLASSES, make_world


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """Flags for a checkpoint folder and a folder of photos."""
    make_world(tmp_path / "world", samples=12)
    torch.manual_seed(0)
    own = recipe.Recipe.model_validate({"model": {"name": "small_cnn", "input_size": 16, "weights": "none"}})
    net = models.build(own.model, len(CLASSES))
    models.write_model(
        tmp_path / "model",
        net,
        models.ModelCard(own.model_dump(mode="json"), "classify", CLASSES, "tiny", "m", 0, 0, "h"),
    )
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    monkeypatch.setenv("OCTOFOLD_HOME", str(tmp_path))
    return Infer(
        model=str(tmp_path / "model"),
        images=tmp_path / "world" / "images",
        tta="flip",
        engine="eager",
        shards=3,
        parallel=2,
        batch_size=2,
    )


@pytest.mark.slow
def test_side_by_side_gives_the_same_bytes(config: Infer, tmp_path: Path) -> None:
    crew, source = crews.muster(config), looks.find(config.images)
    way = crews.how(config, crew)
    written = []
    for parallel in (1, 2):
        asked = config.model_copy(update={"parallel": parallel})
        crews.side_by_side(asked, crew, source, way)
        assert len(shards.plan(crew, source, way, 3).missing()) == (3 if parallel == 1 else 0)
        joined = shards.run(crew, source, way, 3, progress=False)
        assert joined is not None
        written.append(Path(results.write(joined, tmp_path / f"out{parallel}")["predictions"]).read_bytes())
        shards.clear(joined)
    assert written[0] == written[1]


def test_only_what_is_missing_is_made(config: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    crew, source = crews.muster(config), looks.find(config.images)
    way = crews.how(config, crew)
    made = shards.make(crew, shards.plan(crew, source, way, 3), way, 1)
    bytes_ = Path(made).read_bytes()
    asked: list[str] = []
    monkeypatch.setattr(compute, "map_jobs", lambda function, jobs, *_, **__: asked.extend(job.key for job in jobs))
    crews.side_by_side(config, crew, source, way)
    assert asked == ["part 0", "part 2"]
    assert shards.make(crew, shards.plan(crew, source, way, 3), way, 1) == made
    assert Path(made).read_bytes() == bytes_
    assert crews._ready(config.model_dump_json())[0].model_sha == crew.model_sha


def test_a_part_made_elsewhere_finds_what_lies_in_the_project_folder(
    config: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    asked = config.model_copy(update={"images": Path("world/images"), "model": "../model"})
    crew, source = crews.muster(asked), looks.find(asked.images)
    way = crews.how(asked, crew)

    def elsewhere(function: Callable[..., str], jobs: list[Job], *_: Any, **__: Any) -> None:
        monkeypatch.chdir(tmp_path / "there")
        for job in jobs:
            function(*job.arguments)

    monkeypatch.setattr(compute, "map_jobs", elsewhere)
    crews.side_by_side(asked, crew, source, way)
    assert not shards.plan(crew, source, way, 3).missing()


def test_no_model_is_named(config: Infer) -> None:
    with pytest.raises(UserError, match="--model, or --competition"):
        crews.muster(config.model_copy(update={"model": ""}))


@pytest.mark.parametrize("more", [{"member": "m", "competition": "c"}, {"stage": "staging"}])
def test_two_ways_of_naming_a_model_are_refused(config: Infer, more: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"--model with --{next(iter(more))}"):
        crews.muster(config.model_copy(update=more))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_the_bytes_do_not_depend_on_the_number_of_parts(config: Infer, tmp_path: Path, batch_size: int) -> None:
    """Batches of another length would change last bits: 12 images by 5 in two parts would be 5, 1 and 5, 1."""
    crew, source = crews.muster(config), looks.find(config.images)
    way = dataclasses.replace(crews.how(config, crew), batch_size=batch_size)
    written = []
    for count in (1, 2, 3, 5, 12):
        joined = shards.run(crew, source, way, count, progress=False)
        assert joined is not None
        paths = results.write(joined, tmp_path / f"out{count}")
        written.append([Path(path).read_bytes() for path in paths.values()])
    assert all(one == written[0] for one in written)


def test_parts_are_all_the_images_cut_between_batches(config: Infer) -> None:
    crew, source = crews.muster(config), looks.find(config.images)
    for batch_size in range(1, 14):
        for count in range(14):
            way = dataclasses.replace(crews.how(config, crew), batch_size=batch_size)
            parts = shards.plan(crew, source, way, count).parts
            assert [item for part in parts for item in part] == source.items
            assert all(len(part) % batch_size == 0 and len(part) for part in parts[:-1])
