"""Importing: data sets from elsewhere become a folder of images with a table beside it."""

import numpy as np
import pandas as pd
from PIL import Image

from octofold.commands import Prepare
from octofold.files import ROOT, atomic

HELD_OUT = 0.2


def digits(config: Prepare) -> Prepare:
    """Write scikit-learn's digits (1797 real 8x8 scans) as PNGs, a fifth of them kept aside as the test set.

    The truth of the held-out part goes to ``test_truth.csv``, so that an estimate can be compared with what came.

    Returns:
        The flags, with the paths filled in.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.arange(len(data.target))
    train, test = train_test_split(rows, test_size=HELD_OUT, random_state=0, stratify=data.target)
    folder = (config.out or ROOT / "data" / config.competition).absolute()
    for part, chosen in (("train", train), ("test", test)):
        names = [f"{part}_{row:04d}.png" for row in sorted(chosen)]
        for name, row in zip(names, sorted(chosen), strict=True):
            path = folder / "images" / part / name
            if not path.exists():
                pixels = np.rint(data.images[row] * (255 / 16)).astype(np.uint8)
                with atomic(path) as temporary:
                    Image.fromarray(pixels).save(temporary)
        table = pd.DataFrame({"image": names, "label": data.target[sorted(chosen)]})
        with atomic(folder / ("train.csv" if part == "train" else "test_truth.csv")) as temporary:
            table.to_csv(temporary, index=False)
        if part == "test":
            with atomic(folder / "sample_submission.csv") as temporary:
                table.assign(label=0).to_csv(temporary, index=False)
    return config.model_copy(
        update={
            "images": folder / "images" / "train",
            "labels": folder / "train.csv",
            "test_images": folder / "images" / "test",
            "sample_submission": folder / "sample_submission.csv",
        }
    )
