"""Ensembles: checkpoint folders on disk become one thing that predicts, be it a slot, a bag or a whole blend.

What is on disk, and what it becomes::

    DIR/model.json                          one fold model
    DIR/**/model.json                       a folder of them: a bag per member, members averaged equally
    DIR/blend.json + DIR/slots/…            a blend: bags and their combination, as `serving` wrote it
    DIR/MLmodel                             the same inside an MLflow model, found under `artifacts/`
    DIR/**/blend.json                       a blend further below, where it is the only thing there
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from octofold.data.images import PixelSpec
from octofold.errors import UserError, preview
from octofold.files import existing, read_json
from octofold.infer.combining import Blend
from octofold.nets.tasks import make_task
from octofold.predictions import bag_sha
from octofold.recipe import Model

if TYPE_CHECKING:
    from octofold.nets.models import ModelCard, Net

Floats = npt.NDArray[np.float32]
Combine = Callable[[Floats], Floats]  # (M, N, K) -> (N, K), or (M, N, P, 2) -> (N, P, 2)


@dataclass
class Voice:
    """One fold model that speaks in an ensemble.

    Attributes:
        net: in eval mode.
        card: its card.
        spec: the pixels it wants.
        task: activates and undoes its outputs.
        forward: ``(B, 3, S, S)`` uint8 to logits; the net itself until an engine takes its place.
    """

    net: "Net"
    card: "ModelCard"
    spec: PixelSpec
    task: Any
    forward: Any

    @property
    def architecture(self) -> str:
        """What speed depends on: the `model` section without its weights, and the number of outputs."""
        model = self.card.recipe["model"]
        return f"{model['name']} {self.spec.size} px {model['head']} {model['highpass']} {self.card.outputs}"

    @property
    def name(self) -> str:
        """``member.f0.s0``."""
        return f"{self.card.member}.f{self.card.fold}.s{self.card.seed}"


@dataclass
class Ensemble:
    """Voices, bagged per member and combined over members.

    Attributes:
        voices: V fold models.
        bags: per member, the voices that belong to it and their shares (sum 1).
        classes: column order of what comes out.
        name: what the predictions are called.
        combine: members to one; None = the only member, or their plain mean.
        views: the views a blend was fitted with; of a bag, the views its recipe asks for.
        about: the blend's description, where it is one.
        equipped: the engine and precision asked for, once the voices have theirs.
    """

    voices: list[Voice]
    bags: dict[str, list[tuple[int, float]]]
    classes: tuple[str, ...]
    name: str
    combine: Combine | None = None
    views: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    equipped: tuple[str, str] = ("", "")

    @property
    def task(self) -> str:
        """``classify`` or ``keypoints``."""
        return self.voices[0].card.task

    @property
    def is_mean(self) -> bool:
        """Whether it says a weighted mean of its voices: no view left can then move it further than its own share."""
        blend = getattr(self.combine, "__self__", None)
        return self.combine is None or (isinstance(blend, Blend) and blend.is_mean)

    @property
    def manifest_hash(self) -> str:
        """Of the training data (of a blend of several: the one its weights were fitted on)."""
        return str(self.about.get("manifest_hash") or self.voices[0].card.manifest_hash)

    @property
    def trained_on(self) -> list[str]:
        """The manifest hashes of everything a voice trained on: a blend's members may have seen several versions."""
        return sorted({voice.card.manifest_hash for voice in self.voices})

    @property
    def model_sha(self) -> str:
        """One name for all the weights."""
        return bag_sha([voice.card.model_sha for voice in self.voices])

    @property
    def specs(self) -> list[PixelSpec]:
        """The distinct pixels its voices want, in order of first use."""
        return list(dict.fromkeys(voice.spec for voice in self.voices))

    @property
    def seed(self) -> int | None:
        """The one training seed, or None for a bag of several."""
        seeds = {voice.card.seed for voice in self.voices}
        return seeds.pop() if len(seeds) == 1 else None

    def members(self, said: Sequence[Floats]) -> Floats:
        """Bag what each voice said: V arrays ``(N, …)`` in, ``(M, N, …)`` out, columns in the order of `classes`."""
        ordered = [
            values[:, [voice.card.classes.index(name) for name in self.classes]]
            for voice, values in zip(self.voices, said, strict=True)
        ]
        total = np.zeros((len(self.bags), *ordered[0].shape))
        for row, shares in enumerate(self.bags.values()):
            for place, share in shares:
                total[row] += share * ordered[place]
        return total.astype(np.float32)

    def speak(self, said: Sequence[Floats]) -> Floats:
        """Combine what each voice said into one ``(N, K)`` or ``(N, P, 2)`` float32 array."""
        members = self.members(said)
        whole = members.mean(axis=0, dtype=np.float64) if self.combine is None else self.combine(members)
        return np.asarray(whole, dtype=np.float32)


def load(path: Path | str, device: str = "cpu") -> Ensemble:
    """Load whatever models lie under `path`.

    Raises:
        UserError: no model there, a blend among others, weights that do not fit their card, or fold models of different
            tasks, classes or manifests.
    """
    folder = existing(path, "a checkpoint folder, a folder of them, or an MLflow model")
    if folder.name in ("model.json", "model.safetensors", "blend.json", "MLmodel"):
        folder = folder.parent
    described = sorted(folder.glob("blend.json")) or sorted(folder.glob("artifacts/*/blend.json"))
    if described:
        return _load_blend(described[0].parent, device)
    found = sorted(file.parent for file in folder.rglob("model.json")) if folder.is_dir() else []
    if not found:
        raise UserError(
            folder,
            expected="model.json and model.safetensors, here or in folders below",
            got="none",
            fix="give the folder that train wrote, or models:/NAME@production",
        )
    blend = _blend_below(folder, found)
    return _load_blend(blend, device) if blend else load_bag(found, device)


def _blend_below(folder: Path, models: Sequence[Path]) -> Path | None:
    """The one blend that all these models belong to, or None: a plain mean of a blend's slots would be another model.

    Raises:
        UserError: a blend among other models, or several.
    """
    blends = sorted(file.parent for file in folder.rglob("blend.json"))
    others = [place for place in models if not any(place.is_relative_to(blend) for blend in blends)]
    if not blends or (len(blends) == 1 and not others):
        return blends[0] if blends else None
    named = f"{preview(blends, 3)}{f', and {len(others)} models beside' if others else ''}"
    raise UserError(
        folder, expected="one blend, or fold models only", got=f"blends: {named}", fix=f"--model {blends[0]}"
    )


def output_names(task: str, classes: Sequence[str]) -> list[str]:
    """Return what a table calls the K probabilities, or the 2P coordinates."""
    return [f"{name}_{axis}" for name in classes for axis in "xy"] if task == "keypoints" else list(classes)


def load_bag(folders: Sequence[Path], device: str = "cpu") -> Ensemble:
    """Load these checkpoint folders and `bag` them.

    Raises:
        UserError: as `load`.
    """
    return bag([_voice(place, device) for place in folders])


def bag(voices: Sequence[Voice], name: str = "") -> Ensemble:
    """Average fold models: equally within a member, then equally over members.

    Raises:
        UserError: they differ in task, classes or manifest.
    """
    _check(voices, allow_manifests=False)
    groups: dict[str, list[int]] = {}
    for place, voice in enumerate(voices):
        groups.setdefault(voice.card.member, []).append(place)
    bags = {member: [(place, 1 / len(places)) for place in places] for member, places in groups.items()}
    title = name or "+".join(groups)
    views = str(voices[0].card.recipe.get("tta") or "none")
    return Ensemble(list(voices), bags, tuple(voices[0].card.classes), title, views=views)


def _load_blend(folder: Path, device: str) -> Ensemble:
    """Read what `serving.write_blend` wrote."""
    about = read_json(folder / "blend.json", "a blend's description")
    voices: list[Voice] = []
    bags: dict[str, list[tuple[int, float]]] = {}
    for member in about["members"]:
        for slot in member["slots"]:
            voice = _voice(folder / slot["folder"], device)
            if voice.card.model_sha != slot["model_sha"]:
                raise UserError(
                    folder / slot["folder"],
                    expected=f"weights with sha256 {slot['model_sha'][:12]}",
                    got=voice.card.model_sha[:12],
                    fix="fetch the blend again: a file in it was replaced",
                )
            bags.setdefault(member["name"], []).append((len(voices), float(slot["share"])))
            voices.append(voice)
    _check(voices, allow_manifests=True)
    combine = Blend.from_dict(about["combine"]).apply
    return Ensemble(voices, bags, tuple(about["classes"]), about["name"], combine, about["views"], about)


def _voice(folder: Path, device: str) -> Voice:
    from octofold.nets.models import read_model

    net, card = read_model(folder)
    spec = PixelSpec.of(Model.model_validate(card.recipe["model"]))
    net = net.to(device).eval()
    return Voice(net, card, spec, make_task(card.task, card.classes, card.swap), net)


def _check(voices: Sequence[Voice], allow_manifests: bool) -> None:
    """Fold models that are averaged must answer the same question."""
    first = voices[0]
    for other in voices[1:]:
        where = f"models {first.name} and {other.name}"
        if other.card.task != first.card.task:
            raise UserError(where, expected="one task", got=f"{first.card.task} and {other.card.task}")
        if set(other.card.classes) != set(first.card.classes):
            odd = sorted(set(first.card.classes) ^ set(other.card.classes))
            raise UserError(where, expected="the same classes", got=f"different: {preview(odd)}")
        if not allow_manifests and other.card.manifest_hash != first.card.manifest_hash:
            raise UserError(
                where,
                expected="the same manifest hash",
                got=f"{first.card.manifest_hash[:12]} and {other.card.manifest_hash[:12]}",
                fix="train both on one manifest, or leave one out",
            )
