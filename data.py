"""Data sets, and mini-batches of them: images are uint8 in memory, memory-mapped, or files; a mini-batch is float32 in [0, 1].

A data set is one `DatasetSpec` in DATASETS. `BatchLoader` gives the mini-batches of an epoch, with data augmentation.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.arrays import load_arrays
from utils.distributed import ALONE, Process, all_gather
from utils.image_files import ClassOrder, ImageError, classes_in_words, images_by_class, read_image
from utils.modules import generator
from utils.run_folder import new_folder_or_nothing
from utils.workers import WorkerPool

CPU = torch.device("cpu")

Transform = Callable[[Image.Image], Image.Image]


# Splits: examples of one kind


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 from 0 to `levels`, labels (N,) int64, and the data augmentation that suits them."""

    images: Tensor
    labels: Tensor
    levels: int
    padding: int  # random crop of the image padded by so many zeros on each side
    flip: bool  # random horizontal flip, of half of the images

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, n: int) -> Split:
        """The first n examples."""
        return Split(self.images[:n], self.labels[:n], self.levels, self.padding, self.flip)

    def last(self, n: int) -> Split:
        """The last n > 0 examples."""
        return Split(self.images[-n:], self.labels[-n:], self.levels, self.padding, self.flip)

    def in_memory(self, process: Process = ALONE) -> Split:
        """The split itself; a FolderSplit reads its files."""
        return self

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images, (N, C, H, W) float32 in [0, 1], and labels (N,), without augmentation."""
        return self.images.float() / self.levels, self.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def shuffled(self, seed: int, epoch: int) -> ShuffledTensors:
        """An epoch in random order, augmented; a slice of it is images (B, C, H, W) uint8 and labels (B,)."""
        return ShuffledTensors(self, generator(seed, epoch))


@dataclass(frozen=True)
class FolderSplit:
    """N images in files, read when needed: to train, a random resized crop and horizontal flip; to test, what `prepare` makes of them."""

    files: list[str]
    labels: Tensor  # (N,) int64
    size: int  # height and width of an image, in pixels
    prepare: Transform  # resize and crop, nothing random
    levels: int = 255

    def __len__(self) -> int:
        return len(self.files)

    def take(self, n: int) -> FolderSplit:
        """The first n examples; no file is read."""
        return replace(self, files=self.files[:n], labels=self.labels[:n])

    def last(self, n: int) -> FolderSplit:
        """The last n > 0 examples; no file is read."""
        return replace(self, files=self.files[-n:], labels=self.labels[-n:])

    def in_memory(self, process: Process = ALONE) -> Split:
        """All images, prepared; every process reads a share of the files, by a thread for each core.

        Raises ValueError, on all processes, that names a file that holds no image.
        """
        shares = all_gather(self._images(self.files[process.rank :: process.world_size]))
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for rank, share in enumerate(shares):
            if isinstance(share, ImageError):
                raise share
            images[rank :: process.world_size] = share
        return Split(images, self.labels, self.levels, padding=0, flip=False)

    def _images(self, files: list[str]) -> Tensor | ImageError:
        """Those of the files, (B, C, H, W), or the first error."""
        images = torch.empty(len(files), *self.shape, dtype=torch.uint8)
        try:
            with ThreadPoolExecutor(_cores()) as threads:
                for i, image in enumerate(threads.map(lambda file: _read_image(file, self.prepare), files)):
                    images[i] = image
        except ImageError as error:
            return error
        return images

    def check(self, process: Process = ALONE) -> None:
        """Read every file, each process a share, with a bar. Raises ImageError, on all processes, that names one that can't be read."""
        mine = self.files[process.rank :: process.world_size]
        failed: list[ImageError] = []

        def tried(file: str) -> None:
            try:
                read_image(file)
            except ImageError as error:
                failed.append(error)

        with ThreadPoolExecutor(_cores()) as threads:
            shown = None if process.is_rank0 else True
            for _ in tqdm(threads.map(tried, mine), "reading all images", len(mine), leave=False, disable=shown):
                pass
        everywhere = [error for part in all_gather(failed) for error in part]
        if everywhere:
            more = f" (and {len(everywhere) - 1} other files)" if len(everywhere) > 1 else ""
            raise ImageError(f"{everywhere[0]}{more}")

    def pixels(self) -> tuple[Tensor, Tensor]:
        """The same as float32 in [0, 1], (N, 3, H, W), and labels (N,)."""
        return self.in_memory().pixels()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.size, self.size

    def shuffled(self, seed: int, epoch: int) -> ShuffledFiles:
        return ShuffledFiles(self, seed, epoch)


@dataclass(frozen=True)
class Extra(Split):
    """Additional training images from a file, memory-mapped if it is an npz; a worker process that is not forked opens it again."""

    file: str

    @property
    def content(self) -> str:
        """Number of images and a digest of all labels and about 256 images; does not depend on the file's place or format."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self.images[:: max(1, len(self) // 256)].numpy().tobytes())
        return f"{len(self)} images {digest.hexdigest()[:16]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_extra, (self.file, self.levels, self.padding, self.flip)


@dataclass(frozen=True)
class Mixed:
    """Standard and extra images, so many of each per mini-batch; `len`: the examples of an epoch, one pass over the standard ones."""

    standard: Split
    extra: Extra
    standard_per_batch: int
    extra_per_batch: int

    def __len__(self) -> int:
        full_batches, rest = divmod(len(self.standard), self.standard_per_batch)
        return len(self.standard) + full_batches * self.extra_per_batch + self.num_extra(rest)

    def num_extra(self, num_standard: int) -> int:
        """How many extra images go with so many standard ones: in proportion, at least one."""
        return max(1, round(num_standard * self.extra_per_batch / self.standard_per_batch)) if num_standard else 0

    @property
    def levels(self) -> int:
        return self.standard.levels

    def shuffled(self, seed: int, epoch: int) -> ShuffledMix:
        return ShuffledMix(self, seed, epoch)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of one shape, the names of their classes, and perhaps additional training images."""

    name: str
    train: Split | FolderSplit
    test: Split | FolderSplit
    class_names: tuple[str, ...]
    extra: Extra | None = None
    notes: tuple[str, ...] = ()  # what users should know, a line each
    val: Split | FolderSplit | None = None  # training images that are kept out of training

    def hold_out(self, n: int) -> Dataset:
        """The data set with its last n training images as `val`. Raises ValueError if none would be left to train on."""
        left = len(self.train) - n
        if left < 1:
            raise ValueError(f"{self.name} has {len(self.train)} training images, {n} can't be kept out of training")
        return replace(self, train=self.train.take(left), val=self.train.last(n))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.train.shape


# Data sets: each is one DatasetSpec


@dataclass(frozen=True)
class DatasetSpec:
    """All that a data set is: how it is loaded, and the settings for flags left out."""

    name: str  # as --dataset takes it
    summary: str  # its line in --help
    load: Callable[..., Dataset]  # load(name, data_dir, image_size, prepare), the last two for files; ValueError
    radii: dict[str, float]  # eps of each norm, for pixels in [0, 1]
    shape: tuple[int, int, int] | None = None  # (C, H, W) of an image; None: files, read when needed, RGB, of any size
    width: int | None = None  # channels of the first stage of a network from scratch (None: the network's own default)


def load_dataset(
    name: str, data_dir: str, image_size: int = 224, prepare: Transform | None = None, class_order: ClassOrder = "name"
) -> Dataset:
    """The data set called `name`. Raises ValueError that says what to do if it can't be had.

    data_dir: the folder that has it, or to which it is downloaded. image_size: height and width of images that are files, in pixels;
    prepare: how test images are made of files (left out: resized to 8/7 of image_size, cut at the centre); class_order: of folders.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose {' or '.join(DATASETS)}")
    return DATASETS[name].load(name, Path(data_dir), image_size, prepare, class_order)


def _load_cifar(name: str, data_dir: Path, *_: object) -> Dataset:
    """CIFAR-10 or CIFAR-100: 50,000 and 10,000 images of 32 x 32."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    place = data_dir / kind.base_folder
    how = f"give the folder that holds {kind.base_folder} with --data_dir, or use --dataset=digits, which needs no download"
    if not place.exists():
        # Into a folder beside, and moved in place when whole: a failure leaves nothing behind.
        try:
            with new_folder_or_nothing(data_dir), tempfile.TemporaryDirectory(dir=data_dir) as part:
                kind(part, download=True)
                shutil.move(Path(part) / kind.base_folder, place)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name} is not in {data_dir} and could not be downloaded: {how}") from error
    try:
        train, test = kind(str(data_dir), train=True), kind(str(data_dir), train=False)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{place} is not whole: delete it to load it again; {how}") from error

    def split(part: CIFAR10) -> Split:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets), levels=255, padding=4, flip=True)

    return Dataset(name, split(train), split(test), tuple(train.classes))


def _load_digits(*_: object) -> Dataset:
    """scikit-learn's 1,797 8 x 8 digits with values from 0 to 16: 1,297 to train and 500 to test, every class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=500, random_state=0, stratify=labels)

    def split(index: np.ndarray) -> Split:
        pixels = torch.tensor(images[index], dtype=torch.uint8).view(-1, 1, 8, 8)
        # A mirrored digit is no digit, or another; a pixel's shift is 1/8 of the image, as CIFAR-10's four of 32.
        return Split(pixels, torch.tensor(labels[index], dtype=torch.int64), levels=16, padding=1, flip=False)

    return Dataset("digits", split(train), split(test), tuple("0123456789"))


def _load_folders(name: str, data_dir: Path, size: int, prepare: Transform | None, order: ClassOrder) -> Dataset:
    """Images in data_dir/{train,val}/CLASS, made RGB; examples in a random order that is always the same.

    Without train/ it has no training images.
    """
    from torchvision.transforms import v2

    parts = [part for part in ("train", "val") if (data_dir / part).is_dir() or part == "val"]
    try:
        files = {part: images_by_class(data_dir / part, order) for part in parts}
    except (OSError, ValueError) as error:
        layout = "train/CLASS/*.jpg and val/CLASS/*.jpg (to evaluate, val/ alone) in the folder that --data_dir names"
        raise ValueError(f"{error}; {name} is read from {layout}, and never downloaded") from error
    _check_same_classes(data_dir, [*files[parts[0]]], [*files["val"]])
    if prepare is None:
        prepare = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])
    else:
        size = prepare(Image.new("RGB", (size, size))).width

    def split(found: dict[str, list[str]]) -> FolderSplit:
        labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(images) for images in found.values()]))
        order = _fixed_order(labels)
        samples = [file for images in found.values() for file in images]
        return FolderSplit([samples[i] for i in order.tolist()], labels[order], size, prepare)

    val = split(files["val"])
    train = split(files["train"]) if "train" in files else val.take(0)
    classes = tuple(files["val"])
    return Dataset(name, train, val, classes, notes=(classes_in_words(classes, order),))


def _check_same_classes(data_dir: Path, train: list[str], val: list[str]) -> None:
    """Raises ValueError unless train/ and val/ have the same."""
    if odd := sorted({*train} ^ {*val}):
        shown = ", ".join(f"{word} (only in {'train' if word in train else 'val'})" for word in odd[:3])
        differ = f"{len(odd)} differ, such as {shown}"
        raise ValueError(f"train and val in --data_dir={data_dir} must have the same classes; {differ}")


def _fixed_order(labels: Tensor) -> Tensor:
    """A random order (N,) of examples with labels (N,), always the same; the first n, for any n, have the classes in proportion."""
    draws = generator(0)
    by_class = torch.randperm(len(labels), generator=draws)
    by_class = by_class[labels[by_class].argsort(stable=True)]
    counts = labels.bincount()
    turn = torch.cat([torch.arange(n) for n in counts.tolist()])
    # The j-th of a class' n examples has its position at random between j/n and (j + 1)/n of the whole.
    position = (turn + torch.rand(len(labels), generator=draws, dtype=torch.float64)) / counts.repeat_interleave(counts)
    return by_class[position.argsort(stable=True)]


CIFAR_RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
IMAGENET_RADII = {"Linf": 4 / 255, "L2": 2.0, "L1": 255.0}  # for 224 pixels
DIGITS_RADII = {"Linf": 0.1, "L2": 0.4, "L1": 2.0}  # how they were chosen: docs/digits.md

_SPECS = (
    DatasetSpec("cifar10", "32 x 32 pixels, 10 classes", _load_cifar, CIFAR_RADII, (3, 32, 32)),
    DatasetSpec("cifar100", "32 x 32 pixels, 100 classes", _load_cifar, CIFAR_RADII, (3, 32, 32)),
    DatasetSpec("imagenet", "train/CLASS/*.jpg and val/CLASS/*.jpg", _load_folders, IMAGENET_RADII),
    DatasetSpec("imagefolder", "the same, any classes", _load_folders, IMAGENET_RADII),
    DatasetSpec("digits", "8 x 8 pixels, 10 classes, no download", _load_digits, DIGITS_RADII, (1, 8, 8), width=16),
)
DATASETS = {spec.name: spec for spec in _SPECS}


# Additional training images


def load_extra(file: str, data: Dataset) -> Extra:
    """More training images for a data set: an npz with `image` and `label`, uncompressed, or Carmon et al.'s pickle (in memory).

    Raises ValueError if they are not such images and labels as the data set has; OSError.
    """
    train = data.train
    if isinstance(train, FolderSplit):
        others = [spec.name for spec in DATASETS.values() if spec.shape]
        raise ValueError(f"{data.name} takes no extra images; {', '.join(others)} do")
    return _open_extra(file, train.levels, train.padding, train.flip, data)


def _open_extra(file: str, levels: int, padding: int, flip: bool, data: Dataset | None = None) -> Extra:
    """The images where they are and the labels in memory; with `data`, only if they are such as it has."""
    images, labels = load_arrays(Path(file), ["image", "label"], ["data", "extrapolated_targets"])
    if data and (problem := _misfit(images, labels, data, levels)):
        raise ValueError(f"{file} has {problem}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes on them
        tensors = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))
    return Extra(*tensors, levels, padding, flip, file)


def _misfit(images: np.ndarray, labels: np.ndarray, data: Dataset, levels: int) -> str | None:
    """What these arrays have that the images and labels of the data set don't; None if they fit."""
    channels, height, width = data.shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        theirs = f"those of {data.name} are uint8 and (N, {height}, {width}, {channels})"
        return f"images of {images.dtype} and shape {images.shape}, {theirs}"
    n = len(images)
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        return f"labels of {labels.dtype} and shape {labels.shape}, {n} images need integers and ({n},)"
    if not n:
        return "no images"
    if labels.min() < 0 or labels.max() >= data.num_classes:
        theirs = f"those of {data.name} go from 0 to {data.num_classes - 1}"
        return f"labels from {labels.min()} to {labels.max()}, {theirs}"
    if levels < 255 and images.max() > levels:
        return f"pixels up to {images.max()}, those of {data.name} go up to {levels}"
    return None


# Mini-batches


TrainingSplit = Split | FolderSplit | Mixed


def mix(split: Split | FolderSplit, extra: Extra | None, batch_size: int, fraction: float) -> TrainingSplit:
    """The split with `fraction` of each mini-batch (rounded, at least one image of each kind) from `extra`; unchanged without extra."""
    if extra is None:
        return split
    assert isinstance(split, Split), "load_extra gives none for files"
    num_extra = min(max(round(batch_size * fraction), 1), batch_size - 1)
    return Mixed(split, extra, batch_size - num_extra, num_extra)


def on_device(split: TrainingSplit, device: torch.device) -> TrainingSplit:
    """The split with its tensors on the device; unchanged if it is of files or mixed, or needs more than half of a GPU's free memory."""
    if not isinstance(split, Split):
        return split
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return replace(split, images=split.images.to(device), labels=split.labels.to(device))


def number_of_batches(n: int, batch_size: int, world_size: int = 1) -> int:
    """How many mini-batches an epoch of n examples has, in `world_size` processes.

    A smaller last one is dropped unless it has two examples per process (BatchNorm may fail on one), or n is 1 in one process.
    """
    return n // batch_size + (n % batch_size >= 2 * world_size or (n == world_size == 1 < batch_size))


@dataclass(frozen=True)
class BatchLoader:
    """Mini-batches for training: x (B, C, H, W) float32 in [0, 1] and y (B,) on `device`, in random order and with data augmentation.

    A mini-batch depends on (seed, epoch, its number) alone. Process `rank` of `world_size` gets its part as torch.tensor_split
    would. Tensors on the device are indexed there; others by one worker process, ahead of time, and pinned for CUDA; files are read
    by `workers` processes (None: one per core, at most 8; 0: none).
    """

    split: TrainingSplit
    batch_size: int  # of all processes together
    seed: int = 0
    device: torch.device = CPU
    rank: int = 0
    world_size: int = 1
    workers: int | None = None

    def __len__(self) -> int:
        """The number of mini-batches in an epoch."""
        return number_of_batches(len(self.split), self.batch_size, self.world_size)

    def num_examples(self, i: int) -> int:
        """The examples of mini-batch i, of all processes together: batch_size but perhaps for the last."""
        return min(self.batch_size, len(self.split) - i * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of an epoch from number `start` on. Raises ValueError that names a file that holds no image."""
        wanted = [(epoch, number) for number in range(start, len(self))]
        for found in self.pool.load(wanted) if self.pool else map(self.batches.__getitem__, wanted):
            if isinstance(found, ImageError):
                raise found
            images, labels = found
            x = images.to(self.device, non_blocking=True).float() / self.split.levels
            yield x, labels.to(self.device, non_blocking=True)

    @cached_property
    def batches(self) -> ShardedBatches:
        """What worker processes index."""
        return ShardedBatches(self.split, self.batch_size, self.seed, self.rank, self.world_size)

    @cached_property
    def pool(self) -> WorkerPool | None:
        """The worker processes, which stay from epoch to epoch; None if there is nothing for them to do."""
        if isinstance(self.split, FolderSplit):
            workers = min(8, _cores()) if self.workers is None else self.workers
        else:
            standard = self.split.standard if isinstance(self.split, Mixed) else self.split
            workers = int(standard.images.device.type != self.device.type)
        return WorkerPool(self.batches, workers, self.device) if workers else None

    def close(self) -> None:
        """End the worker processes."""
        if self.pool:
            self.pool.close()


@dataclass
class ShardedBatches(torch.utils.data.Dataset[tuple[Tensor, Tensor] | ImageError]):
    """A process' part of each mini-batch, as uint8, by (epoch, number); or the error, as a worker's traceback is not for users."""

    split: TrainingSplit
    batch_size: int
    seed: int
    rank: int
    world_size: int
    current: tuple[int, ShuffledTensors | ShuffledFiles | ShuffledMix] | None = None  # the last epoch asked for

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, Tensor] | ImageError:
        epoch, number = which
        if self.current is None or self.current[0] != epoch:
            self.current = epoch, self.split.shuffled(self.seed, epoch)
        # As torch.tensor_split does it: the first `larger` parts have one example more.
        num_examples = min(self.batch_size, len(self.split) - number * self.batch_size)
        size, larger = divmod(num_examples, self.world_size)
        start = number * self.batch_size + self.rank * size + min(self.rank, larger)
        try:
            return self.current[1][start : start + size + (self.rank < larger)]
        except ImageError as error:
            return error


class ShuffledTensors:
    """An epoch of a split in memory; `[a:b]` are its examples a to b in random order, augmented: images (b - a, C, H, W) uint8, labels.

    Order, crops and flips are drawn at once, so that making a batch waits for nothing. order: the examples (a random order of all).
    """

    def __init__(self, split: Split, draws: torch.Generator, order: Tensor | None = None) -> None:
        order = torch.randperm(len(split), generator=draws) if order is None else order
        n, device = len(order), split.images.device
        self.split, self.order = split, order.to(device)
        self.offset = torch.randint(0, 2 * split.padding + 1, (2, n, 1), generator=draws).to(device)
        self.flipped = (torch.rand(n, 1, generator=draws) < 0.5).to(device) if split.flip else None

    def __getitem__(self, which: slice) -> tuple[Tensor, Tensor]:
        chosen = self.order[which]
        flipped = None if self.flipped is None else self.flipped[which]
        images = _crop_and_flip(self.split.images[chosen], self.split.padding, self.offset[:, which], flipped)
        return images, self.split.labels[chosen]


class ShuffledFiles:
    """The same of a split in files: random resized crop and horizontal flip, which depend on (seed, epoch, example) alone."""

    def __init__(self, split: FolderSplit, seed: int, epoch: int) -> None:
        from torchvision.transforms import v2

        self.split, self.key = split, (seed, epoch)
        self.order = torch.randperm(len(split), generator=generator(seed, epoch))
        self.augment = v2.Compose([v2.RandomResizedCrop(split.size), v2.RandomHorizontalFlip()])

    def __getitem__(self, which: slice) -> tuple[Tensor, Tensor]:
        chosen = self.order[which]
        images = torch.empty(len(chosen), *self.split.shape, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            for row, i in enumerate(chosen.tolist()):
                torch.default_generator.manual_seed(generator(*self.key, i).initial_seed())
                images[row] = _read_image(self.split.files[i], self.augment)
        return images, self.split.labels[chosen]


class ShuffledMix:
    """The same of standard and extra images, the extra ones spread evenly over each mini-batch; a slice lies within one."""

    def __init__(self, split: Mixed, seed: int, epoch: int) -> None:
        # Order and crops of the standard images are those of an epoch without extra ones.
        self.split, self.standard = split, split.standard.shuffled(seed, epoch)
        order = _endless_order(len(split.extra), len(split) - len(split.standard), seed, epoch)
        self.extra = ShuffledTensors(split.extra, generator(seed, epoch, 0, 1), order)

    def __getitem__(self, which: slice) -> tuple[Tensor, Tensor]:
        split = self.split
        number, start = divmod(which.start, split.standard_per_batch + split.extra_per_batch)
        num_standard = min(split.standard_per_batch, len(split.standard) - number * split.standard_per_batch)
        num_extra = split.num_extra(num_standard)
        # How many extra images of the batch come before each example, and before the end: the number grows where one is extra.
        position = torch.arange(start, start + which.stop - which.start + 1)
        extra_before = number * split.extra_per_batch + position * num_extra // max(1, num_standard + num_extra)
        first, last = int(extra_before[0]), int(extra_before[-1])
        parts = self.standard[which.start - first : which.stop - last], self.extra[first:last]
        place = extra_before.diff().argsort(stable=True).argsort()
        images, labels = (torch.cat(both).index_select(0, place) for both in zip(*parts, strict=True))
        return images, labels


def _endless_order(n: int, length: int, seed: int, epoch: int) -> Tensor:
    """Indices (length,) below n for this epoch, from an endless sequence of random permutations that each epoch continues."""
    turn, begin = divmod(epoch * length, n)
    turns = range(turn, turn - (-(begin + length) // n))
    return torch.cat([torch.randperm(n, generator=generator(seed, turn, 0, 0)) for turn in turns])[begin:][:length]


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_image(file: str, transform: Transform) -> Tensor:
    """The image in a file as RGB, transformed: (3, H, W) uint8. Raises ImageError that names the file if it holds none."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    pixels: Tensor = pil_to_tensor(transform(read_image(file)))
    return pixels


def _crop_and_flip(images: Tensor, padding: int, offset: Tensor, flipped: Tensor | None) -> Tensor:
    """Each image (B, C, H, W) padded with zeros, cropped at its offset (2, B, 1) from top and left, perhaps flipped (B, 1)."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = offset
    columns = left + torch.arange(width, device=images.device)
    if flipped is not None:
        columns = torch.where(flipped, columns.flip(1), columns)
    rows = top + torch.arange(height, device=images.device)
    # Indices on both sides of the slice put the channels last: (B, H, W, C).
    cut = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    # clone, not contiguous(): with one channel the latter keeps strides that read as channels-last, where oneDNN's
    # gradient of narrow convolutions corrupts memory (docs/log.md).
    return cut.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
