"""Folders: which files under one are images."""

import os
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")


def find_images(folder: Path) -> list[Path]:
    """Every image file under a folder, by suffix, sorted; hidden ones (``.name``, ``__MACOSX``) left out."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(place, name) for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(found)
