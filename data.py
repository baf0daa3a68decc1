"""Data sets as tensors: images as uint8, made floats in [0, 1] batch by batch; augmentation works on tensors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.run import made_folder
from utils.training import generator

CPU = torch.device("cpu")
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
        return replace(self, images=self.images[:n], labels=self.labels[:n])

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
    split: Split, batch_size: int, seed: int, epoch: int, device: torch.device = CPU
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches on `device`: x (B, C, H, W) float32 in [0, 1], y (B,). They depend on (seed, epoch) alone.

    They are cut where the split is, which costs no copy if that is the device; else by a worker process, a batch ahead.
    The last batch may be smaller, but a single left-over point is not made a batch (BatchNorm may fail on one), unless
    batch_size or the split is 1.
    """
    cuts = _Cuts(split, batch_size, generator(seed, epoch))
    found = (
        (cuts[i] for i in range(len(cuts))) if split.images.device.type == device.type else _from_workers(cuts, device)
    )
    for images, labels in found:
        yield images.float() / split.levels, labels


def number_of_batches(n: int, batch_size: int) -> int:
    """How many batches `batches` gives for n points."""
    return n // batch_size + (n % batch_size > 1 or n == 1 < batch_size)


def on_device(split: Split, device: torch.device) -> Split:
    """The split on the device, or as it is where that is a GPU with less than twice the room."""
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return replace(split, images=split.images.to(device), labels=split.labels.to(device))


class _Cuts(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The batches of an epoch, uint8, by number. All random choices are drawn at once, so that cutting waits for nothing."""

    def __init__(self, split: Split, batch_size: int, draws: torch.Generator) -> None:
        n, device = len(split), split.images.device
        self.split, self.batch_size, self.number = split, batch_size, number_of_batches(n, batch_size)
        self.order = torch.randperm(n, generator=draws).to(device)
        self.shift = torch.randint(0, 2 * split.padding + 1, (2, n, 1), generator=draws).to(device)
        self.mirrored = (torch.rand(n, 1, generator=draws) < 0.5).to(device) if split.flip else None

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        places = slice(number * self.batch_size, (number + 1) * self.batch_size)
        chosen = self.order[places]
        mirrored = None if self.mirrored is None else self.mirrored[places]
        images = _augment(self.split.images[chosen], self.split.padding, self.shift[:, places], mirrored)
        return images, self.split.labels[chosen]


def _from_workers(cuts: _Cuts, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from a process that cuts them ahead, pinned, so that the host does not wait for the copy to the device."""
    loader = torch.utils.data.DataLoader(cuts, batch_size=None, num_workers=1, pin_memory=device.type == "cuda")
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _augment(images: Tensor, padding: int, shift: Tensor, mirrored: Tensor | None) -> Tensor:
    """Each image (B, C, H, W) padded with zeros and cut at shift (2, B, 1) from top and left, then mirrored where told (B, 1)."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = shift
    columns = left + torch.arange(width, device=images.device)
    if mirrored is not None:
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height, device=images.device)
    # Indices on both sides of the slice put the channels last: (B, H, W, C).
    cut = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
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
