"""Networks of our own making: the frame every model sits in, and the originals' small CNNs."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octofold import recipe

HIGHPASS_STD = 0.05
"""Spread of the Laplacian of natural photos in 0..1; a constant, so that no statistics leak from held-out rows."""


SHARPNESS = 10.0
"""Factor on a heatmap's logits."""


class Net(nn.Module):
    """Trunk and head; takes raw pixels, returns logits.

    Attributes:
        trunk: ``(B, 3 or 4, H, W)`` normalised -> ``(B, F)``; `width` is F.
        head: ``(B, F)`` -> ``(B, outputs)``, dropout included.
        mean, std: of the normalisation, on the 0..1 scale, RGB.
        input_size: side of the square it was made for, px.
    """

    scale: Tensor
    shift: Tensor
    kernel: Tensor
    trunk: nn.Module
    head: nn.Module

    def __init__(
        self, trunk: nn.Module, head: nn.Module, config: recipe.Model, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.mean, self.std, self.input_size = tuple(mean), tuple(std), config.input_size
        self.highpass = has_highpass(config)
        self.spatial = config.head == "heatmap"
        # Not in the state dict: they follow from the recipe, and an average of weights must not touch them.
        spread = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread), persistent=False)
        self.register_buffer("shift", torch.tensor(mean).view(1, 3, 1, 1).neg() / spread, persistent=False)
        laplacian = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]]) / 4
        self.register_buffer("kernel", laplacian.view(1, 1, 3, 3), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn ``(B, 3, H, W)`` uint8, or float 0..255, into what the trunk takes (a fourth channel if high-pass)."""
        images = images.to(self.scale.dtype)
        pixels = torch.addcmul(self.shift, images, self.scale)
        if not self.highpass:
            return pixels
        gray = images.mean(dim=1, keepdim=True) / 255
        # A kernel with the square's symmetries and mirrored borders: the channel turns with the image, exactly.
        edges = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="reflect"), self.kernel.to(gray.dtype)) / HIGHPASS_STD
        return torch.cat([pixels, edges.to(pixels.dtype)], dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Return the trunk's pooled features ``(B, F)`` of ``(B, 3, H, W)`` uint8 or float 0..255.

        Under a heatmap head: its last feature map before pooling, ``(B, C h w)``, flattened.
        """
        pixels = self.normalize(images)
        if self.spatial:
            whole: Tensor = self.trunk.forward_features(pixels)  # type: ignore[operator]
            return whole.flatten(1)
        found: Tensor = self.trunk(pixels)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, outputs)`` of ``(B, 3, H, W)`` uint8 or float 0..255."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters below the head."""
        return self.trunk.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the new head."""
        return self.head.parameters()


class Cnn(nn.Sequential):
    """Blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pool, then the mean over space."""

    def __init__(self, channels: int, widths: tuple[int, ...], hidden: int = 0) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(
                nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            )
            layers.append(nn.MaxPool2d(2))
            channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if hidden:
            layers.append(nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True)))
        super().__init__(*layers)
        self.num_features, self.pooled = hidden or channels, 2 * len(widths)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the map before the mean over space, ``(B, C, h, w)``."""
        for layer in list(self)[: self.pooled]:
            images = layer(images)
        return images


class Heatmap(nn.Module):
    """Points as centres of mass: the feature map, four times finer, one softmaxed map per point (Sun et al. 2018).

    A pooled feature forgets where things are; a map's centre of mass is a place by itself, so few images suffice.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        for _ in range(2):
            layers += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.finer = nn.Sequential(*layers)
        self.maps = nn.Conv2d(width, outputs // 2, 1)
        nn.init.normal_(self.maps.weight, std=0.01)
        nn.init.zeros_(self.maps.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(B, 2P)`` places relative to the square's middle, of ``(B, C h w)`` features."""
        side = round((features.shape[1] / self.channels) ** 0.5)
        maps = self.maps(self.finer(features.reshape(-1, self.channels, side, side))).float()
        # A map must be sharp before its mass stops leaning to the middle; the factor lets it become so in few steps.
        share = (SHARPNESS * maps.flatten(2)).softmax(dim=2).reshape(maps.shape)  # (B, P, h, w)
        centres = (torch.arange(maps.shape[-1], device=maps.device, dtype=torch.float32) + 0.5) / maps.shape[-1] - 0.5
        x, y = (share.sum(dim=2) * centres).sum(dim=2), (share.sum(dim=3) * centres).sum(dim=2)
        return torch.stack((x, y), dim=2).flatten(1)


OWN: dict[str, dict[str, Any]] = {
    "small_cnn": {"widths": (64, 128, 256)},  # original 003's baseline
    "simple_cnn": {"widths": (32, 64, 128, 256), "hidden": 256},  # original 001: 455 682 parameters for 2 classes
    "simple_cnn_v2": {"widths": (32, 64, 128, 256), "hidden": 256},  # the same with a high-pass channel
}


def has_highpass(config: recipe.Model) -> bool:
    """Whether the network sees a fourth, high-pass channel."""
    return config.highpass or config.name == "simple_cnn_v2"
