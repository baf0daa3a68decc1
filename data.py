"""Data sets: images as uint8, tensors in memory or mmap_npz, or files read by worker processes, made floats in [0, 1] batch by batch."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.arrays import is_npz, load_pickled_arrays, mmap_npz
from utils.modules import generator
from utils.run_folder import new_folder_or_nothing

CPU = torch.device("cpu")
DATASETS = ("cifar10", "cifar100", "imagenet", "imagefolder", "digits")

Change = Callable[[Image.Image], Image.Image]


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

    def in_memory(self) -> Split:
        """The split itself; its counterpart of files reads them."""
        return self

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images as float32 in [0, 1], (N, C, H, W), and their labels."""
        return self.images.float() / self.levels, self.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class FolderSplit:
    """N images in files, read when needed: `batches` cuts a random part of each, `in_memory` has them as `prepare` makes them."""

    files: list[str]
    labels: Tensor  # (N,) int64
    size: int  # height and width of an image, in pixels
    prepare: Change  # resize and crop, nothing random
    levels: int = 255

    def __len__(self) -> int:
        return len(self.files)

    def first(self, n: int) -> FolderSplit:
        """The first n points; no file is read."""
        return replace(self, files=self.files[:n], labels=self.labels[:n])

    def in_memory(self) -> Split:
        """All images read, by as many threads as there are cores. Raises ValueError that names a file that holds no image."""
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)

        def read(point: int) -> None:
            images[point] = _read(self.files[point], self.prepare)

        with ThreadPoolExecutor(_cores()) as threads:
            list(threads.map(read, range(len(self))))
        return Split(images, self.labels, self.levels, padding=0, flip=False)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images, read, as float32 in [0, 1], (N, C, H, W), and their labels."""
        return self.in_memory().pixels()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.size, self.size


@dataclass(frozen=True)
class Extra(Split):
    """Images of a file, mmap_npz if it is an npz: a worker process that is not forked opens it again instead of being sent them."""

    file: str

    @property
    def content(self) -> str:
        """Their number and a digest of all labels and some 256 images: the same wherever, and in whichever format, they lie."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self.images[:: max(1, len(self) // 256)].numpy().tobytes())
        return f"{len(self)} images {digest.hexdigest()[:16]}"

    def first(self, n: int) -> Split:
        """The first n points, no longer told by the file alone."""
        return Split(self.images[:n], self.labels[:n], self.levels, self.padding, self.flip)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.file, self.levels, self.padding, self.flip)


@dataclass(frozen=True)
class Mixed:
    """Batches of so many standard and so many extra images each. `len` is an epoch's points: one pass over the standard images."""

    standard: Split
    extra: Extra
    each: tuple[int, int]

    def __len__(self) -> int:
        batches, left = divmod(len(self.standard), self.each[0])
        return len(self.standard) + batches * self.each[1] + self.beside(left)

    def beside(self, standard: int) -> int:
        """How many extra images a batch of so many standard ones has: in the same proportion, at least one."""
        return max(1, round(standard * self.each[1] / self.each[0])) if standard else 0

    @property
    def levels(self) -> int:
        return self.standard.levels


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of one shape, with a label for each of the class names; perhaps more to train on."""

    name: str
    train: Split | FolderSplit
    test: Split | FolderSplit
    class_names: tuple[str, ...]
    extra: Extra | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.train.shape


def load_dataset(name: str, data_dir: str, image_size: int = 224, prepare: Change | None = None) -> Dataset:
    """The data set called `name`; raises ValueError with what to do if it can't be had. CIFAR's are downloaded to data_dir if missing.

    imagenet and imagefolder are data_dir/train/CLASS/*.jpg and data_dir/val/CLASS/*.jpg, made RGB and image_size pixels high and wide:
    to train, a random part of the image, perhaps mirrored; to test, resized and cut at the centre, or what `prepare` makes of it.
    """
    match name:
        case "digits":
            return _digits()
        case "cifar10" | "cifar100":
            return _cifar(name, Path(data_dir))
        case "imagenet" | "imagefolder":
            return _folders(name, Path(data_dir), image_size, prepare)
    raise ValueError(f"unknown data set {name!r}; choose {' or '.join(DATASETS)}")


def load_extra(file: str, data: Dataset) -> Extra:
    """More training images for a data set: an npz with `image` and `label`, uncompressed, or Carmon et al.'s pickle (in memory).

    Raises ValueError if they are not such images and labels as the data set has; OSError.
    """
    train = data.train
    if isinstance(train, FolderSplit):
        raise ValueError(f"{data.name} takes no extra images; cifar10, cifar100 and digits do")
    images, labels = _extra_arrays(file)
    channels, height, width = data.shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        raise ValueError(
            f"{file} has images of {images.dtype} and shape {images.shape}, "
            f"those of {data.name} are uint8 and (N, {height}, {width}, {channels})"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{file} has labels of {labels.dtype} and shape {labels.shape}, "
            f"{len(images)} images need integers and ({len(images)},)"
        )
    if not len(images):
        raise ValueError(f"{file} has no images")
    if labels.min() < 0 or labels.max() >= data.num_classes:
        raise ValueError(
            f"{file} has labels from {labels.min()} to {labels.max()}, those of {data.name} go from 0 to {data.num_classes - 1}"
        )
    if train.levels < 255 and images.max() > train.levels:
        raise ValueError(f"{file} has pixels up to {images.max()}, those of {data.name} go up to {train.levels}")
    return Extra(*_as_tensors(images, labels), train.levels, train.padding, train.flip, file)


def mix(
    split: Split | FolderSplit, extra: Extra | None, batch_size: int, fraction: float
) -> Split | FolderSplit | Mixed:
    """Batches of which the share `fraction` (rounded, but neither none nor all) is extra; the split itself if there is no extra."""
    if extra is None:
        return split
    assert isinstance(split, Split), "load_extra gives none for files"
    number = min(max(round(batch_size * fraction), 1), batch_size - 1)
    return Mixed(split, extra, (batch_size - number, number))


def batches(
    split: Split | FolderSplit | Mixed,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device = CPU,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches on `device`: x (B, C, H, W) float32 in [0, 1], y (B,). They depend on (seed, epoch) alone.

    From batch number `first` on; of each the part of process `share` = (rank, number of processes), as torch.tensor_split makes it.
    Tensors are cut where they are, which costs no copy if that is the device; else by a worker process, a batch ahead. Files are
    read by `workers` processes (left out: one per core, at most 8), or in this one if 0. Raises ValueError for a broken file.
    The last batch may be smaller, see `number_of_batches`. Of a mixed split both kinds are cut in memory, and each part of
    a batch, also as torch.tensor_split makes it, has them in proportion.
    """
    cuts: TensorBatches | FileBatches | MixedBatches
    if isinstance(split, FolderSplit):
        cuts = FileBatches(split, batch_size, (seed, epoch), share)
        workers = min(8, _cores()) if workers is None else workers
    elif isinstance(split, Mixed):
        cuts = MixedBatches(split, (seed, epoch), share)
        workers = int(device.type != "cpu")
    else:
        cuts = TensorBatches(split, batch_size, generator(seed, epoch), share)
        workers = int(split.images.device.type != device.type)
    numbers = range(first, len(cuts))
    for images, labels in _from_workers(cuts, numbers, workers, device) if workers else map(cuts.__getitem__, numbers):
        yield images.to(device, non_blocking=True).float() / split.levels, labels.to(device, non_blocking=True)


def number_of_batches(n: int, batch_size: int, number: int = 1) -> int:
    """How many batches `batches` gives for n points and `number` processes.

    Points left over are a batch if there are two for each process (BatchNorm may fail on one), or if batch_size or the split is 1.
    """
    return n // batch_size + (n % batch_size >= 2 * number or (n == number == 1 < batch_size))


def on_device(split: Split | FolderSplit | Mixed, device: torch.device) -> Split | FolderSplit | Mixed:
    """The split on the device, or as it is where it is of files or mixed, or the device a GPU with less than twice the room."""
    if not isinstance(split, Split):
        return split
    if device.type == "cuda" and 2 * split.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return replace(split, images=split.images.to(device), labels=split.labels.to(device))


class ShardedBatches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A process' parts of an epoch's batches, by number: which places in the epoch's order are whose."""

    def __init__(self, n: int, batch_size: int, share: tuple[int, int]) -> None:
        self.n, self.batch_size, self.share = n, batch_size, share
        self.number = number_of_batches(n, batch_size, share[1])

    def __len__(self) -> int:
        return self.number

    def places(self, number: int) -> slice:
        rank, processes = self.share
        start = number * self.batch_size
        each, more = divmod(min(self.batch_size, self.n - start), processes)
        start += rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))


class TensorBatches(ShardedBatches):
    """Batches cut from tensors, uint8. All random choices are drawn at once, so that cutting waits for nothing.

    order: the epoch's points (a random one of all).
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        draws: torch.Generator,
        share: tuple[int, int] = (0, 1),
        order: Tensor | None = None,
    ) -> None:
        order = torch.randperm(len(split), generator=draws) if order is None else order
        n, device = len(order), split.images.device
        super().__init__(n, batch_size, share)
        self.split, self.order = split, order.to(device)
        self.shift = torch.randint(0, 2 * split.padding + 1, (2, n, 1), generator=draws).to(device)
        self.mirrored = (torch.rand(n, 1, generator=draws) < 0.5).to(device) if split.flip else None

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.cut(self.places(number))

    def cut(self, places: slice) -> tuple[Tensor, Tensor]:
        """The images at these places of the order, and their labels."""
        chosen = self.order[places]
        mirrored = None if self.mirrored is None else self.mirrored[places]
        images = _augment(self.split.images[chosen], self.split.padding, self.shift[:, places], mirrored)
        return images, self.split.labels[chosen]


class FileBatches(ShardedBatches):
    """Batches read from files, uint8: of each image a random part, perhaps mirrored, that depends on (seed, epoch, point) alone."""

    def __init__(self, split: FolderSplit, batch_size: int, key: tuple[int, int], share: tuple[int, int]) -> None:
        from torchvision.transforms import v2

        super().__init__(len(split), batch_size, share)
        self.split, self.key, self.order = split, key, torch.randperm(len(split), generator=generator(*key))
        self.augment = v2.Compose([v2.RandomResizedCrop(split.size), v2.RandomHorizontalFlip()])

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        chosen = self.order[self.places(number)]
        images = torch.empty(len(chosen), *self.split.shape, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            for row, point in enumerate(chosen.tolist()):
                torch.default_generator.manual_seed(generator(*self.key, point).initial_seed())
                images[row] = _read(self.split.files[point], self.augment)
        return images, self.split.labels[chosen]


class MixedBatches(ShardedBatches):
    """Standard and extra images cut from tensors and spread evenly over each batch, uint8."""

    def __init__(self, split: Mixed, key: tuple[int, int], share: tuple[int, int]) -> None:
        standard, extra = split.each
        super().__init__(len(split), standard + extra, share)
        self.split = split
        order = _continued(len(split.extra), len(split) - len(split.standard), *key)
        # The standard images' order and crops are those of batches that hold nothing else.
        self.standard = TensorBatches(split.standard, standard, generator(*key))
        self.extra = TensorBatches(split.extra, extra, generator(*key, 0, 1), order=order)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        begin, places = number * self.batch_size, self.places(number)
        standard, extra = self.split.each
        size = min(standard, len(self.split.standard) - number * standard)
        beside = self.split.beside(size)
        within = torch.arange(places.start - begin, places.stop - begin + 1)
        # How many of the epoch's extra images come before each place: one more behind each that is extra.
        before = number * extra + within * beside // (size + beside)
        first, last = int(before[0]), int(before[-1])
        kinds = self.standard.cut(slice(places.start - first, places.stop - last)), self.extra.cut(slice(first, last))
        spread = before.diff().argsort(stable=True).argsort()
        images, labels = (torch.cat(parts).index_select(0, spread) for parts in zip(*kinds, strict=True))
        return images, labels


def _continued(n: int, length: int, seed: int, epoch: int) -> Tensor:
    """An epoch's `length` numbers below n: all n in a random order, then in another, begun where the epoch before ended."""
    begin = epoch * length
    turns = range(begin // n, -(-(begin + length) // n))
    orders = (torch.randperm(n, generator=generator(seed, turn, 0, 0)) for turn in turns)
    return torch.cat(
        [order[max(begin - turn * n, 0) : begin + length - turn * n] for turn, order in zip(turns, orders, strict=True)]
    )


def _from_workers(
    cuts: ShardedBatches, numbers: range, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches from processes that make them ahead, pinned, so that the host does not wait for the copy to the device."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        cuts,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else it would draw a seed from the global one
    )
    try:
        yield from loader
    except BaseException as error:
        traceback.clear_frames(
            error.__traceback__
        )  # they would keep the workers, and lose them to the garbage collector
        raise


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process, and the main one answers them; a worker ends when that one tells it to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there anybody's SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    # multiprocessing ends by SIGTERM the workers that an error's traceback keeps alive, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(file: str, change: Change) -> Tensor:
    """The image in a file as RGB after `change`, (3, H, W) uint8. Raises ValueError that names the file if it holds none."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        image = default_loader(file)
    except Exception as error:  # whatever the decoders raise, the file is what is wrong
        raise ValueError(f"{file} can't be read as an image: {error}") from error
    pixels: Tensor = pil_to_tensor(change(image))
    return pixels


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


def _extra_arrays(file: str) -> list[np.ndarray]:
    """Images and labels as they lie in a file."""
    path = Path(file)
    return (
        mmap_npz(path, "image", "label") if is_npz(path) else load_pickled_arrays(path, "data", "extrapolated_targets")
    )


def _as_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) where they lie, of (N, H, W, C); labels (N,) int64 in memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes on them
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


def _opened_again(file: str, levels: int, padding: int, flip: bool) -> Extra:
    images, labels = _extra_arrays(file)
    return Extra(*_as_tensors(images, labels), levels, padding, flip, file)


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


def _cifar(name: str, data_dir: Path) -> Dataset:
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


def _folders(name: str, data_dir: Path, size: int, prepare: Change | None) -> Dataset:
    """Images in data_dir/{train,val}/CLASS; the classes in alphabetical order, the points in a random one that is always the same."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    try:
        train, val = (ImageFolder(str(data_dir / part)) for part in ("train", "val"))
    except OSError as error:
        raise ValueError(
            f"{error}; {name} is read from train/CLASS/*.jpg and val/CLASS/*.jpg in the folder that --data_dir names, "
            "and never downloaded"
        ) from error
    if odd := sorted({*train.classes} ^ {*val.classes}):
        shown = ", ".join(f"{word} (only in {'train' if word in train.classes else 'val'})" for word in odd[:3])
        raise ValueError(
            f"train and val in --data_dir={data_dir} must have the same classes; {len(odd)} differ, such as {shown}"
        )
    if prepare is None:
        prepare = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])
    else:
        size = prepare(Image.new("RGB", (size, size))).width

    def split(part: ImageFolder) -> FolderSplit:
        labels = torch.tensor(part.targets)
        order = _fixed_order(labels)
        return FolderSplit([part.samples[point][0] for point in order.tolist()], labels[order], size, prepare)

    return Dataset(name, split(train), split(val), tuple(train.classes))


def _fixed_order(labels: Tensor) -> Tensor:
    """A random order (N,) of points with labels (N,), always the same, in which every beginning has the classes in proportion."""
    draws = generator(0)
    by_class = torch.randperm(len(labels), generator=draws)
    by_class = by_class[labels[by_class].argsort(stable=True)]
    counts = labels.bincount()
    turn = torch.cat([torch.arange(n) for n in counts.tolist()])
    # The j-th of a class' n points has its place at random between j/n and (j + 1)/n of the whole.
    place = (turn + torch.rand(len(labels), generator=draws, dtype=torch.float64)) / counts.repeat_interleave(counts)
    return by_class[place.argsort(stable=True)]
