"""Looking at images: oddities by name, hashes that know near-duplicates, and groups that do not depend on row order."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from octofold.data.images import PixelSpec, load
from octofold.errors import UserError
from octofold.prepare import checks, neighbours

RNG = np.random.default_rng(0)


def scene(seed: int, size: int = 96) -> Image.Image:
    """A random landscape of smooth colours: no two alike."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC)


def test_near_duplicates_are_found_and_others_not(tmp_path: Path) -> None:
    """60 scenes; of ten there is a recompressed, a brighter and a smaller copy."""
    names = []
    for seed in range(60):
        scene(seed).save(tmp_path / f"{seed}.png")
        names.append(f"{seed}.png")
    for seed in range(10):
        scene(seed).save(tmp_path / f"{seed}.jpg", quality=60)
        scene(seed).point(lambda value: min(255, value + 8)).save(tmp_path / f"{seed}b.png")
        scene(seed).resize((64, 64)).save(tmp_path / f"{seed}s.png")
        names += [f"{seed}.jpg", f"{seed}b.png", f"{seed}s.png"]
    looks = checks.look(names, tmp_path, progress=False)
    pairs = neighbours.near_pairs(looks.phash, looks.tiny)
    found = {tuple(sorted(name.rstrip("bs.jpng") for name in (names[one], names[other]))) for one, other in pairs}
    assert found == {(str(seed), str(seed)) for seed in range(10)}
    groups = neighbours.components(len(names), pairs)
    assert len(set(groups.tolist())) == 60


def test_near_pairs_equal_brute_force() -> None:
    """Bands and buckets miss nothing: against all pairs, hashes drawn close together."""
    seeds = RNG.integers(0, 2**63, 40, dtype=np.uint64)
    flips = np.uint64(1) << RNG.integers(0, 64, (300, 3)).astype(np.uint64)
    phash = seeds[RNG.integers(0, 40, 300)] ^ flips[:, 0] ^ flips[:, 1] ^ flips[:, 2]
    tiny = RNG.integers(100, 112, (300, 12)).astype(np.uint8)
    got = set(map(tuple, neighbours.near_pairs(phash, tiny).tolist()))
    bits = np.bitwise_count(phash[:, None] ^ phash[None])
    apart = np.abs(tiny[:, None].astype(int) - tiny[None]).mean(axis=2)
    close = np.argwhere((bits <= neighbours.MOST_BITS) & (apart <= neighbours.MOST_DIFFERENCE))
    assert got == {(one, other) for one, other in close.tolist() if one < other}
    assert len(got) > 100


def test_alike_pairs_are_exact_and_nearly_all() -> None:
    rng = np.random.default_rng(0)
    scene = rng.standard_normal((700, 64)).astype(np.float32)
    rows = np.concatenate([scene, scene[:400] + rng.uniform(0, 0.7, (400, 1)).astype(np.float32) * scene[::-1][:400]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = np.triu(rows @ rows.T, 1)
    wanted = {(i, j) for i, j in zip(*np.nonzero(similarity >= neighbours.ALIKE), strict=True)}
    found, near = neighbours.alike_pairs(rows)
    got = set(map(tuple, found.tolist()))
    assert got <= wanted
    assert len(got) >= 0.98 * len(wanted) > 200
    assert np.allclose(near, similarity[found[:, 0], found[:, 1]], atol=1e-5)
    assert (np.diff(near) <= 0).all()
    for few in range(3):
        assert neighbours.alike_pairs(rows[:few])[0].shape == (0, 2)


def test_a_thousand_blank_images_are_one_group_without_all_pairs() -> None:
    phash, tiny = np.zeros(5000, np.uint64), np.zeros((5000, 12), np.uint8)
    pairs = neighbours.near_pairs(phash, tiny)
    assert len(pairs) < 5000
    assert len(set(neighbours.components(5000, pairs).tolist())) == 1


def test_group_names_do_not_depend_on_row_order() -> None:
    ids = np.array(["d", "b", "a", "c", "e"])
    pairs = np.array([[0, 2], [1, 3]])
    names = neighbours.group_names(neighbours.components(5, pairs), ids.tolist())
    assert names == ["near-a", "near-b", "near-a", "near-b", ""]
    order = np.array([4, 3, 2, 1, 0])
    turned = np.sort(4 - pairs, axis=1)
    again = neighbours.group_names(neighbours.components(5, turned), ids[order].tolist())
    assert again == [names[row] for row in order]


@pytest.mark.parametrize(
    ("name", "odd"),
    [("p.png", "palette"), ("a.png", "alpha"), ("c.jpg", "CMYK"), ("m.webp", "animated"), ("s.png", "16-bit"),
     ("f.tif", "32-bit"), ("e.jpg", "EXIF-rotated"), ("e.tif", "EXIF-rotated"), ("t.png", "palette, alpha"),
     ("plain.png", "")],
)  # fmt: skip
def test_oddities_are_named(tmp_path: Path, name: str, odd: str) -> None:
    from test_images import png16

    image, path, exif = scene(0), tmp_path / name, Image.Exif()
    exif[0x0112] = 6
    {
        "p.png": lambda: image.quantize(64).save(path),
        "a.png": lambda: image.convert("RGBA").save(path),
        "c.jpg": lambda: image.convert("CMYK").save(path),
        "m.webp": lambda: image.save(path, save_all=True, append_images=[scene(1)]),
        "s.png": lambda: png16(path, np.asarray(image.convert("L")).astype(np.uint16) * 257),
        "f.tif": lambda: Image.fromarray(np.asarray(image.convert("L"), np.float32)).save(path),
        "e.jpg": lambda: image.crop((0, 0, 96, 40)).save(path, exif=exif),
        "e.tif": lambda: image.crop((0, 0, 96, 40)).save(path, exif=exif),
        "t.png": lambda: image.quantize(64).save(path, transparency=3),
        "plain.png": lambda: image.save(path),
    }[name]()
    row = checks.look([name], tmp_path, progress=False).table.iloc[0]
    assert (row["odd"], row["problem"]) == (odd, "")
    assert (row["width"], row["height"]) == ((40, 96) if name[0] == "e" else (96, 96))


def test_problems_are_told_not_raised(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "whole.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "folder.png").mkdir()
    names = ["whole.jpg", "empty.png", "text.png", "cut.jpg", "folder.png", "gone.png"]
    table = checks.look(names, tmp_path, progress=False).table
    assert table["file"].tolist() == names
    assert (table["problem"] == "").tolist() == [True] + [False] * 5
    for words, said in zip(
        ["0 bytes", "identify", "truncated", "directory", "No such"], table["problem"][1:], strict=True
    ):
        assert words in said


@pytest.mark.parametrize(
    ("most", "kind", "shown"),
    [(1.0, "f4", 255), (1.001, "f4", 255), (100.0, "f4", 100), (255.0, "f4", 255), (300.0, "f4", 255),
     (65535, "f4", 255), (400.0, "f4", 2), (255, "i4", 1), (255, "u2", 1), (65535, "u2", 255), (-1.0, "f4", 0)],
)  # fmt: skip
def test_deep_images_are_decoded_by_their_range_or_named(tmp_path: Path, most: float, kind: str, shown: int) -> None:
    ramp = np.linspace(0, most, 64 * 64).reshape(64, 64).astype(kind)
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    assert load(tmp_path / "x.tif", PixelSpec(64))[0].max() == shown
    row = checks.look(["x.tif"], tmp_path, progress=False).table.iloc[0]
    assert row["odd"] == ("16-bit" if kind == "u2" else "32-bit") + (", comes out black" if shown <= 2 else "")


def test_an_avif_of_zeros_is_told(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "x.avif")
    data = (tmp_path / "x.avif").read_bytes()
    start = data.find(b"mdat") + 4
    (tmp_path / "x.avif").write_bytes(data[:start] + bytes(len(data) - start))
    assert "decode" in checks.look(["x.avif"], tmp_path, progress=False).table["problem"][0]
    with pytest.raises(UserError, match="decode"):
        load(tmp_path / "x.avif", PixelSpec(32))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of what is cut off
@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.webp", "x.avif"])
def test_files_cut_anywhere_are_told_and_seen_as_load_sees_them(tmp_path: Path, name: str) -> None:
    more = [] if name == "x.avif" else [scene(1), scene(2)]
    scene(0).save(tmp_path / name, save_all=bool(more), append_images=more)
    whole = (tmp_path / name).read_bytes()
    for share in np.linspace(0.05, 0.98, 24):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        problem = checks.look([name], tmp_path, progress=False).table["problem"][0]
        try:
            load(tmp_path / name, PixelSpec(32))
        except UserError:
            assert problem
        else:
            assert not problem


def test_brightness_and_blur_order_images(tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    noise.save(tmp_path / "sharp.png")
    noise.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "blurred.png")
    Image.new("RGB", (96, 96)).save(tmp_path / "black.png")
    table = checks.look(["sharp.png", "blurred.png", "black.png"], tmp_path, progress=False).table.set_index("file")
    assert table["sharpness"].is_monotonic_decreasing
    assert table.loc["black.png", "brightness"] == 0
    assert 0.4 < table.loc["sharp.png", "brightness"] < 0.6


def test_id_is_of_the_bytes_alone(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "a.png")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "другое имя.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    table = checks.look(["a.png", "moved/другое имя.jpg"], tmp_path, progress=False).table
    assert table["sample_id"].nunique() == 1
    assert table["sample_id"].str.fullmatch("[0-9a-f]{16}").all()
