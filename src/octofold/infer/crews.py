"""Crews: the models that infer's flags name, and the parts of a big job done side by side, here or on a cluster."""

import json
from functools import lru_cache
from typing import Any

from octofold import compute
from octofold.commands import Infer
from octofold.errors import UserError
from octofold.files import resolve
from octofold.infer import ensemble, inference, looks, shards
from octofold.infer.ensemble import Ensemble
from octofold.infer.inference import How
from octofold.infer.looks import Source
from octofold.track import registry, tracking
from octofold.workers import Job

_STORED = ("models:/", "runs:/")


def muster(config: Infer) -> Ensemble:
    """Return the models the flags name, as one ensemble.

    Raises:
        UserError: none named, two ways at once, or not there.
    """
    if config.model and (config.member or config.stage != "production"):
        got = f"--model with {f'--member {config.member}' if config.member else f'--stage {config.stage}'}"
        raise UserError("infer", expected="--model, or --competition with --member and --stage", got=got)
    device = inference.pick_device(config.device)
    if config.competition and config.member:
        slots = registry.resolve(config.competition, config.stage, [config.member])[config.member]
        return ensemble.load_bag([registry.fetch(slot) for slot in slots], device)
    address = config.model or (f"models:/{config.competition}.blend@{config.stage}" if config.competition else "")
    if not address:
        raise UserError("infer", expected="--model, or --competition with --member", got="neither")
    return ensemble.load(tracking.fetch_uri(address, address) if address.startswith(_STORED) else address, device)


def how(config: Infer, crew: Ensemble) -> How:
    """Return how the flags want to look."""
    views = config.tta or crew.views
    return How(views, config.batch_size, config.engine, config.precision, config.early_exit)


def side_by_side(config: Infer, crew: Ensemble, source: Source, way: How) -> None:
    """Make the missing parts of the job as jobs of `compute`, if that was asked for; joining is left to the caller.

    A part is a file in the shared project folder, keyed by weights, images and settings: whoever makes it, and however
    often it is begun, the bytes are the same.
    """
    if config.shard is not None or (config.executor == "local" and (config.parallel or 1) == 1):
        return
    places = {"images": str(resolve(config.images))}  # as this process finds them: the others may stand elsewhere
    if config.model and not config.model.startswith(_STORED):
        places["model"] = str(resolve(config.model))
    settings = json.dumps(config.model_dump(mode="json") | places)
    jobs = [
        Job(f"part {place}", (settings, place)) for place in shards.plan(crew, source, way, config.shards).missing()
    ]  # fmt: skip
    if jobs:
        compute.map_jobs(make_part, jobs, config.executor, config.parallel, title="parts")


def make_part(settings: str, place: int) -> str:
    """Make one part in a process of its own; return its file. Models stay loaded for the next part."""
    crew, cut, way = _ready(settings)
    return shards.make(crew, cut, way, place)


@lru_cache(maxsize=1)
def _ready(settings: str) -> tuple[Any, shards.Plan, How]:
    config = Infer.model_validate_json(settings)
    crew = muster(config)
    way = how(config, crew)
    return crew, shards.plan(crew, looks.find(config.images), way, config.shards), way
