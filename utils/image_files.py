"""Folders of images, a folder for each class, and images in files: RGB with their true values, or an error that names the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

ClassOrder = Literal["name", "numeric"]
CLASS_ORDERS: tuple[ClassOrder, ...] = ("name", "numeric")
LEVELS = 255


class ImageError(ValueError):
    """A file holds no image, or one whose values can't be had."""


def class_folders(folder: Path, order: ClassOrder) -> list[str]:
    """Names of the folders in `folder`, hidden ones left out, in the order of their names or numbers. Raises ValueError, OSError."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"there is no class folder in {folder}")
    if order == "numeric":
        if odd := [name for name in names if not _is_number(name)]:
            raise ValueError(f"the classes are not all numbers, such as {odd[0]!r} in {folder}")
        names.sort(key=lambda name: (int(name), name))
    return names


def images_by_class(folder: Path, order: ClassOrder) -> dict[str, list[str]]:
    """The images of each class folder in `folder`. Raises ValueError if there is no class, or one without images; OSError."""
    found = {name: images_in(folder / name) for name in class_folders(folder, order)}
    if empty := [name for name, images in found.items() if not images]:
        raise ValueError(f"{len(empty)} of the classes in {folder} have no images, such as {empty[0]}")
    return found


def classes_in_words(names: Sequence[str], order: ClassOrder) -> str:
    """Which class is which output of a network; for numbers in the order of their names, 0 1 10 2, that there is another."""
    shown = f"{' '.join(names[:4])}{' ...' * (len(names) > 4)}"
    text = f"{len(names)} classes in the order of their {'numbers' if order == 'numeric' else 'names'}: {shown}"
    if not all(map(_is_number, names)) or [*names] == sorted(names, key=lambda name: (int(name), name)):
        return text
    return f"{text}; they are numbers, --class_order=numeric puts 2 before 10"


def images_in(folder: Path) -> list[str]:
    """Every image in a class' folder and the folders in it, sorted, without hidden ones and what is no regular file. Raises OSError."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[tuple[str, str]] = []
    folders, seen = [str(folder)], set[tuple[int, int]]()
    while folders:
        place = folders.pop()
        about = os.stat(place)  # noqa: PTH116
        if (about.st_dev, about.st_ino) in seen:  # links may lead round
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in os.scandir(place):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
                found.append((place, entry.name))
    return [str(Path(place) / name) for place, name in sorted(found)]


def read_image(file: str) -> Image.Image:
    """The image in a file, made RGB with 8 bits; a grey one of 16 bits or of floats in [0, 1] is rounded to these.

    Raises ImageError that names the file if it holds none, or pixels whose range is not known.
    """
    try:
        with Image.open(file) as image:
            image.load()
            if image.mode.startswith("I;16"):
                return _grey(np.asarray(image).astype(np.float64) / (2**16 - 1))
            if image.mode == "F":
                return _grey(np.asarray(image).astype(np.float64))
            if image.mode == "I":
                raise ValueError("its pixels are whole numbers of 32 bits, whose range is not known")
            return image.convert("RGB")
    except Exception as error:  # whatever the decoders raise, the file is what is wrong
        raise ImageError(f"{file} can't be read as an image: {error}") from error


def _grey(values: np.ndarray) -> Image.Image:
    """From values in [0, 1]. Raises ValueError for others."""
    if not (values >= 0).all() or not (values <= 1).all():
        raise ValueError(
            f"its pixels go from {values.min():g} to {values.max():g}; those in floating point have to be in [0, 1]"
        )
    return Image.fromarray((values * LEVELS).round().astype(np.uint8)).convert("RGB")


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
