"""Data sets as tensors: images as uint8, made floats in [0, 1] batch by batch; augmentation works on tensors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.run import made_folder
from utils.training import generator

DATASETS = ("cifar10", "digits")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 from 0 to `levels`, labels (N,) int64, and the augmentation that suits them."""

    images: Tensor
    labels: Tensor
    levels: int
    padding: int  # training images are moved by up to this many pixels
    flip: bool  # and mirrored, each second one

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Split:
        """The first n points."""
        return Split(self.images[:n], self.labels[:n], self.levels, self.padding, self.flip)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images as float32 in [0, 1], (N, C, H, W), and their labels."""
        return self.images.float() / self.levels, self.labels


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of one shape, with a label for each of the class names."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_dataset(name: str, data_dir: str) -> Dataset:
    """The data set called `name` (cifar10: from data_dir, downloaded if missing). Raises ValueError with what to do if it can't be had."""
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _cifar10(Path(data_dir))
    raise ValueError(f"unknown data set {name!r}; choose {' or '.join(DATASETS)}")


def batches(
    split: Split, batch_size: int, seed: int, epoch: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches: x (B, C, H, W) float32 in [0, 1], y (B,). Order and augmentation depend on (seed, epoch) alone.

    The last batch may be smaller, but a single left-over point is not made a batch (BatchNorm may fail on one), unless
    batch_size or the split is 1.
    """
    draws = generator(seed, epoch)
    order = torch.randperm(len(split), generator=draws)
    for chosen in order.split(batch_size):
        if len(chosen) > 1 or batch_size == 1 or len(order) == 1:
            images = _augment(split.images[chosen], split.padding, split.flip, draws)
            yield images.to(device).float() / split.levels, split.labels[chosen].to(device)


def number_of_batches(n: int, batch_size: int) -> int:
    """How many batches `batches` gives for n points."""
    return n // batch_size + (n % batch_size > 1 or n == 1 < batch_size)


def _augment(images: Tensor, padding: int, flip: bool, draws: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) padded with zeros and cut at a random place, then mirrored with probability 1/2 if `flip`."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=draws)
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, 1, generator=draws) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    # Indices on both sides of the slice put the channels last: (B, H, W, C).
    cut = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    # clone, not contiguous(): with one channel the latter keeps strides that read as channels-last, where oneDNN's
    # gradient of narrow convolutions corrupts memory (docs/LOG.md).
    return cut.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def _digits() -> Dataset:
    """scikit-learn's 1,797 8 x 8 digits with values from 0 to 16: 1,297 to train and 500 to test, every class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=500, random_state=0, stratify=labels)

    def split(index: np.ndarray) -> Split:
        pixels = torch.tensor(images[index], dtype=torch.uint8).view(-1, 1, 8, 8)
        # A mirrored digit is another sign or none; a pixel's shift is 1/8 of the image, as CIFAR-10's four of 32.
        return Split(pixels, torch.tensor(labels[index], dtype=torch.int64), levels=16, padding=1, flip=False)

    return Dataset("digits", split(train), split(test), tuple("0123456789"))


def _cifar10(data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    how = "give the folder that holds cifar-10-batches-py with --data_dir, or use --dataset=digits, which needs no download"
    if not (data_dir / CIFAR10.base_folder).exists():
        _download_cifar10(data_dir, how)

    def split(train: bool) -> Split:
        try:
            part = CIFAR10(str(data_dir), train=train)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{data_dir / CIFAR10.base_folder} is not whole: delete it to load it again; {how}"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets), levels=255, padding=4, flip=True)

    return Dataset("cifar10", split(train=True), split(train=False), CIFAR10_CLASSES)


def _download_cifar10(data_dir: Path, how: str) -> None:
    """Download into a folder beside, and move it in place when whole: a failure leaves nothing behind."""
    from torchvision.datasets import CIFAR10

    try:
        with made_folder(data_dir), tempfile.TemporaryDirectory(dir=data_dir) as part:
            CIFAR10(part, download=True)
            shutil.move(Path(part) / CIFAR10.base_folder, data_dir / CIFAR10.base_folder)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"CIFAR-10 is not in {data_dir} and could not be downloaded: {how}") from error
