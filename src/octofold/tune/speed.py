"""Speed: how long a recipe's network takes for one image and view, on the machine at hand."""

import time

import numpy as np
import torch

from octofold.compute import Devices
from octofold.data.manifest import Manifest
from octofold.nets import models
from octofold.nets.tasks import make_task
from octofold.recipe import Model


def inference_ms(model: Model, table: Manifest, devices: Devices) -> float:
    """Return milliseconds per image and view, forward pass only: the median of nine batches of eight."""
    outputs = make_task(table.task, table.classes).outputs
    net = models.build(model, outputs, load_weights=False).to(devices.device).eval()
    images = torch.zeros(8, 3, model.input_size, model.input_size, device=devices.device)
    taken = []
    with torch.inference_mode():
        for _ in range(12):
            begun = time.perf_counter()
            float(net(images).sum())  # reading the number waits for the device
            taken.append(time.perf_counter() - begun)
    return float(np.median(taken[3:])) / 8 * 1000
