"""Serving: fold models and whole blends become MLflow models that need neither the registry nor the network.

A packed model holds the weights (safetensors), this package's source, pinned requirements and a signature: bytes of
an image in, probabilities or points out. What is inside is a checkpoint folder, or a folder that `write_blend` made::

    blend.json      members, slots (registered name, version, run, sha256, share), views, classes, how they combine
    slots/NAME/     model.safetensors, model.json of each slot
"""

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from octofold.errors import UserError, preview
from octofold.files import read_json, write_json
from octofold.infer.combining import Blend
from octofold.infer.ensemble import output_names
from octofold.nets.models import read_card
from octofold.track import tracking, versions
from octofold.track.outage import patiently
from octofold.track.registry import Slot, fetch

PACKAGES = (  # what the code inside a packed model imports
    "mlflow", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml", "safetensors", "scipy", "timm", "torch",
    "torchvision", "tqdm",
)  # fmt: skip


def requirements() -> list[str]:
    """Return the exact versions of what a packed model needs, as they are installed here.

    OpenVINO is not among them: the engines that are there give the same probabilities.
    """
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")  # +cpu builds are not on the package index
        except PackageNotFoundError as error:
            raise UserError(f"package {name}", expected="installed", got="not", fix="make setup") from error
    return found


def pack(folder: Path | str, out: Path | str) -> Path:
    """Turn a checkpoint folder, or a blend's folder, into an MLflow model in `out` (replaced if it is there).

    Returns:
        `out`, which ``mlflow models serve -m OUT`` and `ensemble.load` both take.

    Raises:
        UserError: `folder` holds no model.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # of copying two files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own modules warn of each other's type hints when imported
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

    folder, out = Path(folder).absolute(), Path(out)
    is_blend = (folder / "blend.json").exists()
    about = read_json(folder / "blend.json") if is_blend else vars(read_card(folder))
    names = output_names(about["task"], about["classes"])
    signature = ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]), outputs=Schema([ColSpec("float", name) for name in names])
    )
    shutil.rmtree(out, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no input example": the signature is explicit, an example costs 10 s
        mlflow.pyfunc.save_model(
            path=str(out),
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"model": str(folder)},
            signature=signature,
            pip_requirements=requirements(),
            code_paths=[str(Path(__file__).parents[1])],
            metadata={"views": about.get("views", ""), "task": about["task"], "classes": list(about["classes"])},
        )
    return out


def write_blend(
    folder: Path | str,
    name: str,
    blend: Blend,
    slots: Mapping[str, Sequence[Slot]],
    shares: Mapping[str, Sequence[float]],
    views: str,
    manifest_hash: str,
    extra: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Gather a blend's fold models and how they combine into one folder.

    Args:
        folder: to make; replaced if it is there.
        name: ``<competition>.blend``.
        blend: members to one, its weights in the order of `slots`.
        slots: registered fold models per member.
        shares: per member, each slot's share in the bag; they sum to 1.
        views: row of `tta.VIEWS` it was fitted with.
        manifest_hash: of the data its weights were fitted on.
        extra: anything else worth keeping (estimate, run id, class map …); JSON.
        classes: the order it was fitted in, which class-wise weights follow; none = the first fold model's.

    Raises:
        UserError: shares that do not fit, fold models of different tasks or classes, or one that is gone.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    members, cards = [], []
    for member, own in slots.items():
        entries = [
            _gather_slot(folder, slot, share) for slot, share in zip(own, _bag(member, own, shares), strict=True)
        ]
        cards += [read_card(folder / entry["folder"]) for entry in entries]
        members.append({"name": member, "slots": entries})
    first = cards[0]
    odd = [card.member for card in cards if (card.task, set(card.classes)) != (first.task, set(first.classes))]
    if odd:
        raise UserError(
            f"blend {name}", expected=f"one task and class set, as {first.member}", got=f"others: {preview(odd)}"
        )
    about = {
        "name": name,
        "competition": first.competition,
        "task": first.task,
        "classes": list(classes or first.classes),
        "views": views,
        "manifest_hash": manifest_hash,
        "members": members,
        "combine": blend.to_dict(),
        "extra": dict(extra or {}),
    }
    write_json(folder / "blend.json", about)
    return folder


def _bag(member: str, own: Sequence[Slot], shares: Mapping[str, Sequence[float]]) -> list[float]:
    """The shares of a member's fold models, checked."""
    parts = np.asarray(shares[member], dtype=np.float64)
    if parts.shape != (len(own),) or (parts < 0).any() or not np.isclose(parts.sum(), 1, atol=1e-6):
        raise UserError(f"bag of member '{member}'", expected=f"{len(own)} shares that sum to 1", got=str(parts))
    found: list[float] = parts.tolist()
    return found


def _gather_slot(folder: Path, slot: Slot, share: float) -> dict[str, Any]:
    """Copy a fold model's weights and card into a blend's folder; return its entry."""
    place, source = f"slots/{slot.name}.v{slot.version}", fetch(slot)
    (folder / place).mkdir(parents=True)
    for file in ("model.safetensors", "model.json"):
        shutil.copyfile(source / file, folder / place / file)
    return {
        "folder": place,
        "share": share,
        "model_sha": read_card(source).model_sha,
        "name": slot.name,
        "version": slot.version,
        "run_id": slot.run_id,
        "fold": slot.fold,
        "seed": slot.seed,
        "manifest_hash": slot.manifest_hash,
    }


def pack_slot(model_folder: Path | str, scratch: Path | str) -> Path:
    """Pack a checkpoint folder in `scratch`; `registry.register_slot` uploads what comes back as the run's model."""
    return pack(model_folder, Path(scratch) / "packed")


def log_blend(run: tracking.Run, folder: Path | str, tags: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Upload a packed blend as the run's ``model/`` and register it as ``<competition>.blend``.

    Args:
        run: the blend's run.
        folder: what `pack` made of `write_blend`'s folder.
        tags: more tags for the version, beside competition, views, manifest hash and the sha256 of its description.

    Returns:
        Registered name and version. No alias is moved: that is promotion's to decide.

    Raises:
        UserError: not a packed blend.
    """
    folder = Path(folder)
    about = read_json(folder / "artifacts" / _inner(folder) / "blend.json", "a packed blend")
    run.log_artifacts(folder, "model")
    labels = {
        "competition": about["competition"], "views": about["views"], "manifest_hash": about["manifest_hash"],
        "method": about["combine"]["method"], **(tags or {}),
    }  # fmt: skip
    versions.ensure_registered(about["name"], {"competition": about["competition"]})
    source = f"{run.artifact_uri.rstrip('/')}/model"

    def create() -> Any:
        made = versions.versions_of([about["name"]], f"run_id = '{run.id}'")
        return made[0] if made else tracking.client().create_model_version(
            about["name"], source, run_id=run.id, tags=labels, await_creation_for=0
        )  # fmt: skip

    return about["name"], int(patiently(create).version)


def _inner(folder: Path) -> str:
    found = sorted(path.parent.name for path in (folder / "artifacts").glob("*/blend.json"))
    if not found:
        raise UserError(folder, expected="a packed blend (artifacts/*/blend.json)", got="none", fix="serving.pack it")
    return found[0]
