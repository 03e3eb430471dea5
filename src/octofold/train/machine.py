"""Machine: what this processor must be told to train at its best, whatever the network.

Measured on a Xeon with AMX (2 cores), a step of 32 images at 128 px, bf16 with channels last, before and after:
vit_tiny 330 to 195 ms (torch's fused attention spends 40 % of the step in its backward pass), convnext_atto 310 to
230 ms and tf_efficientnet_lite0 720 to 400 ms (oneDNN's bf16 weight gradient of a depthwise convolution takes three
times as long as its float32 one). Keeping freed memory spares 40,000 page faults a step: 4 to 20 %.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MOST = 2**31 - 1


@contextlib.contextmanager
def computing(device: str, precision: str) -> Iterator[None]:
    """Compute in `precision` (``fp32``, ``bf16``, ``fp16``); a training step on a CPU avoids the slow bf16 kernels.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        precision: of matrix products and convolutions; weights stay float32.
    """
    half = HALVES.get(precision)
    learns = torch.is_grad_enabled()  # the slow kernels are those of the backward pass
    swift = _Swift() if device == "cpu" and precision == "bf16" and learns else contextlib.nullcontext()
    with torch.autocast(device, half, enabled=half is not None), swift:
        yield


def keep_memory() -> None:
    """Let glibc keep freed memory: a step frees and asks for the same large tensors, each time zeroed by the kernel."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MOST)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_TOP_PAD, 64 << 20)


class _Swift(TorchFunctionMode):
    """Within it, the operations of `_INSTEAD` go another way; the network stays as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _convolve(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    """``torch.conv2d``; a depthwise one in float32, rounded to bf16 afterwards."""
    if weight.shape[1] != 1 or input.shape[-3] == 1:
        return torch.conv2d(input, weight, *args, **options)
    with torch.autocast("cpu", enabled=False):
        return torch.conv2d(input.float(), weight, *args, **options).to(torch.bfloat16)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """``scaled_dot_product_attention`` (..., tokens, width), its products one after the other."""
    if (
        options.get("is_causal")
        or options.get("enable_gqa")
        or (attn_mask is not None and not attn_mask.is_floating_point())
    ):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
    scale = options.get("scale")
    weights = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    weights = (weights if attn_mask is None else weights + attn_mask).softmax(-1)
    return functional.dropout(weights, dropout_p) @ value


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _convolve,
    functional.scaled_dot_product_attention: _attend,
}
