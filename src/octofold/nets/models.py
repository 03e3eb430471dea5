"""Models: a recipe becomes a network with its weights; a checkpoint folder keeps them with their card."""

import difflib
import os
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octofold import recipe
from octofold.errors import UserError, preview
from octofold.files import atomic, read_json, sha256_file, write_json
from octofold.nets import weights
from octofold.nets.networks import OWN, Cnn, Heatmap, Net, has_highpass

__all__ = ["ModelCard", "Net", "build", "depths", "read_card", "read_model", "synchronised", "write_model"]

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NORMALIZE = {"imagenet": IMAGENET, "half": HALF, "none": NONE}


def depths(net: Net) -> dict[str, int]:
    """Depth of each parameter by its name in `net`, 0 at the input; the head is deepest. For layer-wise rates."""
    from timm.models import group_parameters

    names = [name for name, _ in net.trunk.named_parameters()]
    matcher: Any = getattr(net.trunk, "group_matcher", None)
    if matcher is not None:
        found = group_parameters(net.trunk, matcher(coarse=False), reverse=True)
    else:
        found = {name: int(name.split(".")[0]) for name in names}
    levels = sorted({int(found[name]) for name in names})
    rank = {level: place for place, level in enumerate(levels)}
    return {f"trunk.{name}": rank[int(found[name])] for name in names} | {
        f"head.{name}": len(levels) for name, _ in net.head.named_parameters()
    }


def build(config: recipe.Model, outputs: int, load_weights: bool = True, start: Path | None = None) -> Net:
    """Make the network a recipe describes.

    Args:
        config: what to build. `weights` may be ``none``, ``pretrained``, ``package``, or a local file or checkpoint
            folder; the entry point turns ``models:/…`` into such a folder first.
        outputs: number of logits.
        load_weights: False makes the bare network, to be filled by `read_model`.
        start: the file or checkpoint folder that `config.weights` (``models:/…``) turned out to mean.

    Raises:
        UserError: an unknown name, weights that are not there or do not fit, a size the network cannot take.
    """
    source = str(start or config.weights) if load_weights else "none"
    trunk = _own(config) if config.name in OWN else _timm(config, pretrained=source == "pretrained")
    mean, std = _normalization(trunk, config)
    width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    if config.head == "heatmap":
        width = _map_channels(trunk, config)
    net = Net(trunk, _head(config, int(width), outputs), config, mean, std)
    if source not in ("none", "pretrained"):
        _fill(net, config, source)
    if load_weights:
        _try_size(net, config)
    return net


def synchronised(net: Net) -> Net:
    """Make every BatchNorm normalise by the batches of all processes together; weights and their names stay.

    By timm's conversion: torch's own would lose the activations that timm's `BatchNormAct2d` holds.
    """
    from timm import layers

    converted: Net = layers.convert_sync_batchnorm(net)  # type: ignore[attr-defined, no-untyped-call]
    return converted


def _own(config: recipe.Model) -> nn.Module:
    if config.weights in ("pretrained", "package"):
        raise UserError(
            "model.weights", expected=f"none or a file: {config.name} is ours, trained from scratch", got=config.weights
        )
    if config.drop_path:
        raise UserError(
            "model.drop_path", expected=f"0: {config.name} has no stochastic depth", got=str(config.drop_path)
        )
    return Cnn(4 if has_highpass(config) else 3, **OWN[config.name])


def _head(config: recipe.Model, width: int, outputs: int) -> nn.Module:
    if config.head == "heatmap":
        return Heatmap(width, outputs, config.head_hidden)
    drop = [nn.Dropout(config.drop_rate)]
    if config.head == "linear":
        return nn.Sequential(*drop, nn.Linear(width, outputs))
    hidden = config.head_hidden  # original 002 on Swin: Linear 512, ReLU, dropout .3, Linear
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), *drop, nn.Linear(hidden, outputs))


def _map_channels(trunk: nn.Module, config: recipe.Model) -> int:
    """Channels of the trunk's last feature map; refuse trunks whose last features are no map."""
    if isinstance(trunk, Cnn):
        return next(m.out_channels for m in reversed(list(trunk.modules())) if isinstance(m, nn.Conv2d))
    if hasattr(trunk, "patch_embed") or not hasattr(trunk, "forward_features"):
        raise UserError("model.head: heatmap", expected="a convolutional network", got=f"model.name: {config.name}")
    channels: Any = trunk.num_features
    return int(channels)


def _normalization(trunk: nn.Module, config: recipe.Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.normalize != "weights":
        return NORMALIZE[config.normalize]
    known: dict[str, Any] = getattr(trunk, "pretrained_cfg", None) or {}
    return tuple(known.get("mean", HALF[0])), tuple(known.get("std", HALF[1]))


def _timm(config: recipe.Model, pretrained: bool) -> nn.Module:
    """Make timm's network without its classifier."""
    import timm

    base = config.name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, [*timm.list_models(), *OWN], n=6, cutoff=0.5)
        raise UserError(
            f"model.name: {config.name}",
            expected="a timm model",
            got="no such name",
            fix=f"near ones: {preview(near, 6)}",
        )
    options: dict[str, Any] = {"num_classes": 0, "in_chans": 3 if pretrained else 3 + has_highpass(config)}
    try:
        known = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    except RuntimeError as error:
        raise _refusal(config, error, pretrained) from error
    if known is not None and known.fixed_input_size and known.input_size[1] != config.input_size:
        options["img_size"] = config.input_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if pretrained:
        _check_hub()
    try:
        trunk: nn.Module = timm.create_model(config.name, pretrained=pretrained, **options)
    except TypeError as error:
        raise UserError(
            f"model.name: {config.name}", expected=f"a network that takes {preview(options)}", got=str(error)
        ) from error
    except (RuntimeError, AssertionError, ValueError, OSError) as error:
        raise _refusal(config, error, pretrained) from error
    if pretrained and has_highpass(config):
        wide: nn.Module = timm.create_model(config.name, pretrained=False, **{**options, "in_chans": 4})
        wide.load_state_dict(weights.widen_input(trunk.state_dict(), _first_conv(trunk), 4))
        return wide
    return trunk


def _first_conv(trunk: nn.Module) -> str:
    known: dict[str, Any] = getattr(trunk, "pretrained_cfg", None) or {}
    name = known.get("first_conv", "0.0")
    return f"{name if isinstance(name, str) else name[0]}.weight"


def _refusal(config: recipe.Model, error: Exception, pretrained: bool) -> UserError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "pretrained" in text.lower():  # an unknown tag after the dot, or a network without published weights
        import timm

        tags = timm.list_pretrained(config.name.split(".")[0] + "*")
        return UserError(
            f"model.name: {config.name}",
            expected="a name with published weights",
            got=text,
            fix=f"one of {preview(tags, 8)}",
        )
    if isinstance(error, OSError) or pretrained:
        return _no_hub(config, text)
    return UserError(f"model.input_size: {config.input_size}", expected=f"a size {config.name} can take", got=text)


def _no_hub(config: recipe.Model, text: str) -> UserError:
    packaged = (
        "package (it is one of those with a package)"
        if config.name.split(".")[0] in weights.PACKAGES
        else (f"package (only for {', '.join(weights.PACKAGES)})")
    )
    return UserError(
        f"model.weights: pretrained ({config.name})",
        expected="to fetch the weights from the timm hub (Hugging Face), or to find them in its cache",
        got=text,
        fix=f"model.weights can also be: {packaged}; a .pth or .safetensors file brought by hand; models:/NAME/VERSION"
        " from the registry; none (from scratch)",
    )


def _check_hub() -> None:
    """Refuse at once to wait for a hub that cannot be reached; its client would retry for a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True  # its cache may still hold them


def _fill(net: Net, config: recipe.Model, source: str) -> None:
    """Load a package's, a file's or another member's weights: the trunk whole, the head where it fits."""
    if source.startswith("models:"):
        raise UserError("model.weights", expected="a path: the entry point resolves models:/ first", got=source)
    if source == "package":
        stages = [len(stage) for stage in getattr(net.trunk, "blocks", [])]
        state, where = weights.read_package(config.name, stages), "model.weights: package"
    else:
        state, where = weights.read_file(source), f"model.weights: {source}"
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    if any(name.startswith("trunk.") for name in state):  # one of ours
        trunk = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
    else:
        trunk, head = _split_classifier(net, state)
    if net.highpass:
        trunk = weights.widen_input(trunk, _first_conv(net.trunk), 4)
    weights.load_strict(net.trunk, _adapt(net.trunk, trunk), where)
    own = net.head.state_dict()
    if head and {k: v.shape for k, v in head.items()} == {k: v.shape for k, v in own.items()}:
        net.head.load_state_dict(head)


def _split_classifier(net: Net, state: weights.State) -> tuple[weights.State, weights.State]:
    """Part a plain timm (or torchvision) state dict into trunk and, if it is one linear layer, head."""
    known: dict[str, Any] = getattr(net.trunk, "pretrained_cfg", None) or {}
    names = known.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    trunk = {k: v for k, v in state.items() if not any(k.startswith(f"{name}.") for name in names)}
    trunk = {k: v for k, v in trunk.items() if not k.startswith("AuxLogits.")}  # Inception's second head
    last = [name for name, _ in net.head.named_parameters()][-1].rpartition(".")[0]
    head = {
        f"{last}.{leaf}": state[f"{name}.{leaf}"]
        for name in names[:1]
        for leaf in ("weight", "bias")
        if f"{name}.{leaf}" in state
    }
    return trunk, head


def _adapt(trunk: nn.Module, state: weights.State) -> weights.State:
    """Let timm resize position embeddings and rename old keys, where the network has such a filter."""
    filter_state = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    own = {name: value.shape for name, value in trunk.state_dict().items()}
    fits = own == {name: value.shape for name, value in state.items()}
    return state if fits or filter_state is None else dict(filter_state(state, trunk))


def _try_size(net: Net, config: recipe.Model) -> None:
    """Refuse an input size the trunk cannot take, before anything long begins."""
    known: dict[str, Any] = getattr(net.trunk, "pretrained_cfg", None) or {}
    patch = getattr(getattr(net.trunk, "patch_embed", None), "patch_size", None)
    size, step = config.input_size, (patch[0] if patch else 1)
    if size % step:
        near = (size // step * step, (size // step + 1) * step)
        raise UserError(
            f"model.input_size: {size}",
            expected=f"a multiple of {config.name}'s patch, {step}",
            fix=f"{near[0]} or {near[1]}",
        )
    if size == (known.get("input_size") or (3, 0, 0))[1]:
        return
    net.eval()
    try:
        with torch.no_grad():
            net.features(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        usual = (known.get("input_size") or (3, 32, 32))[1]
        raise UserError(
            f"model.input_size: {size}",
            expected=f"a size {config.name} can take (made for {usual})",
            got=str(error).splitlines()[0],
            fix="raise it, or choose another network",
        ) from error
    finally:
        net.train()


@dataclass
class ModelCard:
    """What a checkpoint folder says of its weights (model.json).

    Attributes:
        recipe: the full recipe, plain values.
        task: ``classify`` or ``keypoints``.
        classes: class (or point) names in the order of the outputs.
        competition, member, fold, seed: the slot.
        manifest_hash: of the data it was trained on.
        swap: keypoints: the index of each point's mirror twin; None = unknown.
        info: anything else; JSON.
        model_sha: sha256 of model.safetensors; `write_model` fills it.
    """

    recipe: dict[str, Any]
    task: str
    classes: tuple[str, ...]
    competition: str
    member: str
    fold: int
    seed: int
    manifest_hash: str
    swap: list[int] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    model_sha: str = ""

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.classes) * (2 if self.task == "keypoints" else 1)


def write_model(folder: Path | str, net: Net, card: ModelCard) -> ModelCard:
    """Write a checkpoint folder: ``model.safetensors``, then ``model.json`` with its sha256; each atomic."""
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    written = ModelCard(**{**asdict(card), "model_sha": sha256_file(folder / "model.safetensors")})
    written.classes = tuple(card.classes)
    write_json(folder / "model.json", asdict(written))
    return written


def read_model(folder: Path | str) -> tuple[Net, ModelCard]:
    """Read a checkpoint folder; return the network in eval mode, and its card.

    Raises:
        UserError: no such folder, a file that is damaged, or weights that do not match the card.
    """
    card = read_card(folder)
    file = Path(folder) / "model.safetensors"
    if not file.exists() or sha256_file(file) != card.model_sha:
        raise UserError(
            file,
            expected=f"weights with sha256 {card.model_sha[:12]}…",
            got="other bytes" if file.exists() else "no file",
        )
    net = build(recipe.Model(**card.recipe["model"]), card.outputs, load_weights=False)
    weights.load_strict(net, weights.read_file(file), file)
    return net.eval(), card


def read_card(folder: Path | str) -> ModelCard:
    """Read only ``model.json`` of a checkpoint folder.

    Raises:
        UserError: it is missing or not such a file.
    """
    file = Path(folder) / "model.json"
    found = read_json(file, "a checkpoint folder's model.json")
    try:
        card = ModelCard(**found)
        card.classes = tuple(card.classes)
    except TypeError as error:
        raise UserError(file, expected="a model card", got=str(error)) from error
    return card
