"""Photos of every kind become the same pixels, and points stay where they were."""

import errno
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from octofold.data.decoding import content_id
from octofold.data.folders import find_images, left_out, refuse_unseen
from octofold.data.images import LONGEST, PixelCache, PixelSpec, load, open_cache, square
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.infer import looks

SPECS = [PixelSpec(32), PixelSpec(32, "squash"), PixelSpec(32, "pad"), PixelSpec(32, "crop", 0.8)]


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture whose four corners differ, so that every turn of it is another picture."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    return Image.fromarray(np.uint8(np.stack([x, y, (x + y) / 2], axis=2) * 255))


def rgb(path: Path) -> np.ndarray:
    """The photo at its own size."""
    return load(path, PixelSpec(32, "crop"))[0].astype(int)


def png16(path: Path, grey: np.ndarray) -> None:
    """Write a 16-bit grey PNG by hand: what scanners and microscopes make."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_every_mode_shows_the_same_picture(tmp_path: Path) -> None:
    """Palette, alpha, CMYK, 16-bit, animated: near the plain RGB of the same scene."""
    plain = photo()
    grey = plain.convert("L")
    plain.save(tmp_path / "plain.png")
    grey.save(tmp_path / "grey.png")
    truth, grey_truth = rgb(tmp_path / "plain.png"), rgb(tmp_path / "grey.png")
    clear = plain.convert("RGBA")
    plain.quantize(256).save(tmp_path / "palette.png")
    clear.save(tmp_path / "alpha.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    plain.save(tmp_path / "animated.webp", save_all=True, append_images=[Image.new("RGB", plain.size)], lossless=True)
    png16(tmp_path / "sixteen.png", np.asarray(grey).astype(np.uint16) * 257)
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(tmp_path / "float.tif")
    for name, wanted, off in [
        ("palette.png", truth, 12), ("alpha.png", truth, 0), ("cmyk.jpg", truth, 12), ("animated.webp", truth, 0),
        ("sixteen.png", grey_truth, 1), ("float.tif", grey_truth, 1),
    ]:  # fmt: skip
        assert np.abs(rgb(tmp_path / name) - wanted).max() <= off, name


def test_what_is_see_through_is_white(tmp_path: Path) -> None:
    hidden = np.full((32, 32, 4), (255, 0, 0, 0), np.uint8)
    Image.fromarray(hidden).save(tmp_path / "clear.png")
    assert (rgb(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_pixels_and_size(tmp_path: Path, turn: int) -> None:
    """The camera stores the scene turned and says so; we see the scene."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    scene = photo()
    stored = scene.transpose(undo[turn]) if turn in undo else scene
    exif = Image.Exif()
    exif[0x0112] = turn
    scene.save(tmp_path / "scene.png")
    stored.save(tmp_path / "stored.png", exif=exif)
    stored.save(tmp_path / "plain.tif", exif=exif)  # Pillow turns TIFFs itself: not twice
    stored.save(tmp_path / "packed.tif", exif=exif, compression="tiff_lzw")
    for spec in SPECS:
        wanted, frame = load(tmp_path / "scene.png", spec)
        for name in ("stored.png", "plain.tif", "packed.tif"):
            got, turned = load(tmp_path / name, spec)
            assert np.array_equal(got, wanted)
            assert turned == frame


def write_whole(path: Path) -> bytes:
    """Write a JPEG and return its bytes."""
    photo(200, 160).save(path, quality=95)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("gone", lambda data: None, "no such file"),
        ("empty", lambda data: b"", "0 bytes"),
        ("cut", lambda data: data[: len(data) // 2], "truncated"),
        ("text", lambda data: b"<html>404</html>", "cannot identify"),
        ("noise", lambda data: data[:100] + bytes(range(256)), "readable image"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, spoil: Callable[[bytes], bytes | None], words: str) -> None:
    path = tmp_path / f"{name}.jpg"
    data = spoil(write_whole(path))
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        load(path, PixelSpec(32))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [(48, 32), (31, 77), (32, 32), (400, 20), (13, 200), (900, 700)], ids=str)
def test_frame_follows_the_pixels(tmp_path: Path, spec: PixelSpec, size: tuple[int, int]) -> None:
    """A coordinate ramp painted into the photo reads, in the square, what the frame says of that place."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x / width, y / height, 0 * x], axis=2) * 255
    Image.fromarray(np.uint8(np.rint(ramp))).save(tmp_path / "ramp.png")
    image, frame = load(tmp_path / "ramp.png", spec)
    cut = square(image, spec.size)
    assert cut.shape == (spec.size, spec.size, 3)
    unit = (np.stack(np.meshgrid(*[np.arange(8, 24, 5)] * 2), axis=-1).reshape(-1, 2) + 0.5) / spec.size
    pixels = frame.to_pixels(unit)
    inside = ((pixels > 2) & (pixels < np.array(size) - 3)).all(axis=1)
    seen = cut[(unit[:, 1] * spec.size).astype(int), (unit[:, 0] * spec.size).astype(int)]
    said = pixels / np.array(size) * 255
    assert np.abs(seen[inside, :2] - said[inside]).max(initial=0) <= 2.5
    assert np.allclose(frame.to_unit(pixels), unit)


def test_frame_edges_and_missing_points(tmp_path: Path) -> None:
    """The photo's outermost pixel centres lie half a pixel inside the unit square; NaN stays NaN."""
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    _, frame = load(tmp_path / "x.png", PixelSpec(10, "squash"))
    unit = frame.to_unit([[0, 0], [39, 19], [np.nan, np.nan]])
    assert np.allclose(unit[:2], [[0.5 / 40, 0.5 / 20], [39.5 / 40, 19.5 / 20]])
    assert np.isnan(unit[2]).all()


def test_big_jpegs_are_decoded_small_but_alike(tmp_path: Path) -> None:
    """Decoding at 1/4 (draft) and at full size agree to the eye, and points stay within a pixel of the square."""
    big = photo(1999, 1501)
    big.save(tmp_path / "big.jpg", quality=95)
    big.save(tmp_path / "big.png")
    (small, one), (full, other) = load(tmp_path / "big.jpg", PixelSpec(64)), load(tmp_path / "big.png", PixelSpec(64))
    assert small.shape == full.shape
    assert np.abs(small.astype(int) - full).mean() < 1.5
    corner = [[700.0, 900.0]]
    assert np.abs(one.to_unit(corner) - other.to_unit(corner)).max() * 64 < 0.1


def test_a_strip_does_not_explode(tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 2), "red").save(tmp_path / "strip.png")
    image, _ = load(tmp_path / "strip.png", PixelSpec(64))
    assert image.shape == (64, 64 * LONGEST, 3)


def manifest_of(folder: Path, count: int = 5) -> Manifest:
    """Photos on disk and their manifest."""
    folder.mkdir(exist_ok=True)
    for row in range(count):
        photo(40 + row, 36).save(folder / f"{row}.png")
    names = [f"{row}.png" for row in range(count)]
    table = pd.DataFrame({"sample_id": [f"s{row:015x}" for row in range(count)], "path": names})
    return Manifest(table, "classify", ("a", "b"), "c", folder)


def test_cache_holds_what_load_says(tmp_path: Path) -> None:
    manifest, spec = manifest_of(tmp_path / "photos"), PixelSpec(32)
    cache = open_cache(manifest, spec, tmp_path / "cache", progress=False)
    again = pickle.loads(pickle.dumps(cache))
    assert isinstance(again, PixelCache)
    assert len(cache) == len(again) == 5
    for row, path in enumerate(manifest.paths):
        image, frame = load(path, spec)
        assert np.array_equal(cache[row], image)
        assert np.array_equal(again[row], image)
        assert cache.frames[row] == frame
        assert cache.square(row).shape == (32, 32, 3)
    assert not cache[0].flags.writeable


def test_a_file_that_changed_since_prepare_is_refused(tmp_path: Path) -> None:
    """Somebody puts a photo in front and numbers all anew: each label would now stand beside another photo."""
    manifest, spec = manifest_of(tmp_path / "photos", 3), PixelSpec(32)
    ids = [content_id(path.read_bytes()) for path in manifest.paths]
    true = replace(manifest, table=manifest.table.assign(sample_id=ids))
    assert len(open_cache(true, spec, tmp_path / "cache", progress=False)) == 3
    for row in (2, 1, 0):
        (tmp_path / "photos" / f"{row}.png").rename(tmp_path / "photos" / f"{row + 1}.png")
    photo(50, 36).save(tmp_path / "photos" / "0.png")
    with pytest.raises(UserError, match=r"(?s)[012].png.*changed since.*prepare again"):
        open_cache(true, spec, tmp_path / "other", progress=False)
    with pytest.raises(UserError, match="changed since"):
        looks.look(looks.items_of(true)[1], [spec])
    assert len(open_cache(manifest, spec, tmp_path / "other", progress=False)) == 3  # ids that name no content


def test_cache_serves_any_part_of_itself(tmp_path: Path) -> None:
    """A cleaned, reordered manifest finds the cache that is there, even when the photos are gone."""
    manifest, spec = manifest_of(tmp_path / "photos"), PixelSpec(32)
    whole = open_cache(manifest, spec, tmp_path / "cache", progress=False)
    kept = [np.array(whole[row]) for row in (3, 1)]
    for path in manifest.paths:
        path.unlink()
    part = open_cache(manifest.take(np.array([3, 1])), spec, tmp_path / "cache", progress=False)
    assert all(np.array_equal(part[row], kept[row]) for row in (0, 1))
    with pytest.raises(UserError, match="no such file"):
        open_cache(manifest, PixelSpec(24), tmp_path / "cache", progress=False)


def test_interrupted_cache_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some photos, and in the middle of a line: the next call decodes the rest, and only that."""
    from octofold.data import images

    manifest, spec = manifest_of(tmp_path / "photos", 6), PixelSpec(32)
    wanted = [load(path, spec)[0] for path in manifest.paths]
    monkeypatch.setattr(images, "AHEAD", 2)
    first, late = (manifest.paths[row] for row in np.argsort(manifest.sample_ids)[[0, 4]])  # decoded in this order
    hidden = late.read_bytes()
    late.unlink()
    with pytest.raises(UserError, match=late.name):
        open_cache(manifest, spec, tmp_path / "cache", progress=False)
    (part,) = (tmp_path / "cache").glob(".*.part")
    with (part / "rows.jsonl").open("a") as log:
        log.write("[32, 3")
    late.write_bytes(hidden)
    first.unlink()  # already decoded: not asked for again
    cache = open_cache(manifest, spec, tmp_path / "cache", progress=False)
    assert all(np.array_equal(cache[row], wanted[row]) for row in range(6))


def test_an_interrupted_cache_that_goes_on_in_another_order_mixes_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octofold.data import images

    manifest, spec = manifest_of(tmp_path / "photos", 6), PixelSpec(32)
    wanted = {name: load(path, spec)[0] for name, path in zip(manifest.sample_ids, manifest.paths, strict=True)}
    monkeypatch.setattr(images, "AHEAD", 2)
    last = manifest.paths[int(np.argsort(manifest.sample_ids)[-1])]
    hidden = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="png"):
        open_cache(manifest, spec, tmp_path / "cache", progress=False)
    last.write_bytes(hidden)
    other = manifest.take(np.array([5, 2, 0, 4, 3, 1]))  # the labels were sorted anew meanwhile
    cache = open_cache(other, spec, tmp_path / "cache", progress=False)
    assert all(np.array_equal(cache[row], wanted[name]) for row, name in enumerate(other.sample_ids))


def test_find_images_is_sorted_and_skips_the_hidden(tmp_path: Path) -> None:
    for name in (
        "b.JPG",
        "a/ж 🍏.png",
        ".hidden.png",
        "__MACOSX/x.png",
        ".git/y.heic",
        "notes.txt",
        "a/c.HEIC",
        "d.jfif",
        "README",
        "desktop.ini",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a/ж 🍏.png", "b.JPG"]
    assert [name for name, _ in left_out(tmp_path)] == ["a/c.HEIC", "d.jfif", "linked"]


def test_a_folder_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png", "b/.hidden/3.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    real = os.scandir

    def scandir(path: str) -> Any:  # root may open every folder: what the system says to others
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert left_out(tmp_path) == [("b", "Permission denied")]
    assert looks.find(tmp_path).left_out == [("b", "Permission denied")]  # so skipped.csv and the warnings name it
    with pytest.raises(UserError, match=r"1 that may not: b \(Permission denied\)"):
        refuse_unseen(tmp_path)
    with pytest.raises(UserError, match=r"none, but 1 others: \. \(Permission denied\)"):
        looks.find(tmp_path / "b")
