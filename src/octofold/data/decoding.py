"""Decoding: the bytes of an image file become upright RGB.

What is odd about a photo is decided here, once:

==================  ==================================================================================
turned by EXIF      turned upright; points are in the pixels of the upright photo
alpha, palette      laid on white (dropping alpha would show whatever colour hides behind it)
16-bit, 32-bit      65535 becomes 255, no stretching per image
float               by the largest value: up to 1, 1 becomes 255; up to 255, as it is; else 65535 becomes 255
CMYK, YCbCr, LAB    converted to RGB by Pillow
animated            the first frame
grey                three equal channels
==================  ==================================================================================
"""

import hashlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from octofold.errors import UserError

Pixels = npt.NDArray[np.uint8]
OVER = 1.5  # float images up to 1 (or 255) times this run over [0, 1] (or [0, 255]): resampling overshoots
ID_LENGTH = 16
_CONTENT_ID = re.compile(f"[0-9a-f]{{{ID_LENGTH}}}")
MOST_PIXELS = 300_000_000
Image.MAX_IMAGE_PIXELS = None  # `open_bytes` refuses by MOST_PIXELS instead


def open_image(path: Path | str, sample_id: str = "") -> Image.Image:
    """Open an image; its pixels are decoded when first asked for.

    Args:
        path: the file.
        sample_id: what a manifest calls it: see `check_content`.

    Raises:
        UserError: no such file, empty, not an image, too many pixels, or not the one that the manifest means.
    """
    try:
        data = Path(path).read_bytes()
        check_content(data, sample_id, path)
        return open_bytes(data, path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def content_id(data: bytes) -> str:
    """A file's `sample_id`: the first 16 hex digits of its bytes' sha256."""
    return hashlib.sha256(data).hexdigest()[:ID_LENGTH]


def check_content(data: bytes, sample_id: str, path: Path | str) -> None:
    """Refuse a file that is another one than prepare gave this id; an id that names no content says nothing.

    Raises:
        UserError: the content has changed since.
    """
    if _CONTENT_ID.fullmatch(sample_id) and (now := content_id(data)) != sample_id:
        raise UserError(
            path,
            expected=f"the image that prepare saw under this name, sample {sample_id}",
            got=f"another one, {now}: the file has changed since, or another was renamed to it",
            fix="run prepare again (--previous or --decisions keeps the folds)",
        )


def open_bytes(data: bytes, path: Path | str) -> Image.Image:
    """Open the bytes of an image file; `path` is only what errors call it. Raises as `open_image`."""
    if not data:
        raise UserError(path, expected="an image", got="an empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise UserError(path, expected="at most 300 megapixels", got=f"{image.width} x {image.height}")
    return image


# What Pillow's decoders raise on broken files.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, KeyError, TypeError, RuntimeError,
          struct.error)  # fmt: skip
_UNREADABLE = (*BROKEN, zlib.error, Image.DecompressionBombError)


def _unreadable(path: Path | str, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # Pillow says where in memory it looked
        reason = "cannot identify an image format"
    if isinstance(error, FileNotFoundError):
        reason = "no such file"
    return UserError(path, expected="a readable image", got=reason, fix="replace the file or remove its row")


def upright_size(image: Image.Image, path: Path | str = "image") -> tuple[int, int]:
    """(width, height) of an opened photo once it is upright, px.

    Raises:
        UserError: a TIFF whose pixels cannot be decoded.
    """
    if image.format == "TIFF":  # Pillow turns these as it decodes, and older ones know the size only then
        try:
            image.load()
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
    return (image.height, image.width) if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """How an opened photo's pixels lie, EXIF's 1..8: what `upright` has to turn. TIFFs come out of Pillow upright."""
    return 1 if image.format == "TIFF" else orientation_tag(image)


def orientation_tag(image: Image.Image) -> int:
    """EXIF orientation 1..8 as the file has it; 1 (upright) where there is none or the block is broken."""
    try:
        value = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image, path: Path | str = "image") -> Image.Image:
    """Turn as EXIF says.

    Raises:
        UserError: the pixels cannot be decoded.
    """
    turn = _TURNS.get(orientation(image))
    try:
        return image if turn is None else image.transpose(turn)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, path: Path | str = "image") -> Pixels:
    """Return ``(H, W, 3)`` uint8 by the table at the head of this file.

    Raises:
        UserError: the pixels cannot be decoded (truncated, corrupt).
    """
    try:
        if image.mode.startswith("I") or image.mode == "F":
            grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
            most = grey.max(initial=0) / OVER if image.mode == "F" else np.inf
            unit = 255.0 if most <= 1 else 1.0 if most <= 255 else 255 / 65535
            grey = np.clip(np.rint(grey * unit), 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if has_alpha(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixel may be see-through."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
