"""Data sets: a fixed digits split, batches that cover each point once, augmentation against a slow reference."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attacks.norms import NORMS
from data import (
    DATASETS,
    BatchLoader,
    Dataset,
    DatasetSpec,
    ShuffledTensors,
    Split,
    load_dataset,
    number_of_batches,
)
from utils.workers import WorkerPool


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def numbered(n: int, flip: bool = False, padding: int = 1) -> Split:
    """n images of 1 x 4 x 4 whose label tells the image."""
    images = torch.randint(1, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return Split(images, torch.arange(n), levels=255, padding=padding, flip=flip)


def test_digits_split_is_fixed() -> None:
    digits = load_dataset("digits", "/nowhere")
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1297, 500, 10)
    assert digits.shape == (1, 8, 8)
    assert (digest(digits.train.labels), digest(digits.test.labels)) == ("5457d35851d806e0", "bd2e9b7c2aa9b6b5")
    assert (digest(digits.train.images), digest(digits.test.images)) == ("88a4f8245e33f904", "6b259e4b4d2cd106")


def test_digits_halves_are_the_whole_set_in_proportion() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digits = load_dataset("digits", "/nowhere")
    rows = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    whole = torch.tensor(images, dtype=torch.uint8)
    # As many points and the same ones, so none is in both.
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, whole.tolist()))
    counts = torch.bincount(torch.tensor(labels))
    for split in (digits.train, digits.test):
        share = counts * len(split) / len(labels)
        assert float((torch.bincount(split.labels) - share).abs().max()) < 1
        assert not split.flip


def test_digits_pixels() -> None:
    digits = load_dataset("digits", "/nowhere")
    for split in (digits.train, digits.test):
        x, y = split.pixels()
        assert x.dtype == torch.float32
        assert (float(x.min()), float(x.max())) == (0, 1)
        assert torch.equal(y, split.labels)
        first, labels = split.take(7).pixels()
        assert torch.equal(first, x[:7])
        assert torch.equal(labels, y[:7])


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=" or ".join(DATASETS)):
        load_dataset("cifar-10", "/nowhere")


def test_a_data_set_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, data_dir: Path, *_: object) -> Dataset:
        assert data_dir == Path("folder")
        return Dataset(name, numbered(20), numbered(10), tuple(map(str, range(20))))

    spec = DatasetSpec("numbers", "made by this test", load, {"Linf": 0.1, "L2": 0.5, "L1": 2.0})
    monkeypatch.setitem(DATASETS, spec.name, spec)
    data = load_dataset("numbers", "folder")
    assert (data.name, len(data.train), data.num_classes, data.shape) == ("numbers", 20, 20, (1, 4, 4))
    with pytest.raises(ValueError, match=r"choose .* or numbers"):
        load_dataset("cifar-10", "/nowhere")


@pytest.mark.parametrize("spec", DATASETS.values(), ids=lambda spec: spec.name)
def test_every_data_set_has_a_radius_for_every_norm_and_a_line_of_help(spec: DatasetSpec) -> None:
    assert DATASETS[spec.name] is spec
    assert list(spec.radii) == list(NORMS)
    assert spec.summary


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [20, 21, 22, 23, 27])
def test_the_loader_tells_how_many_batches_and_examples_there_are(n: int, world_size: int) -> None:
    loaders = [BatchLoader(numbered(n), 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    sizes = [
        sum(map(len, labels)) for labels in zip(*([y for _, y in loader.epoch(0)] for loader in loaders), strict=True)
    ]
    assert len(sizes) == len(loaders[0])
    assert sizes == [loaders[0].num_examples(i) for i in range(len(sizes))]


@pytest.mark.parametrize(
    ("n", "batch_size"), [(10, 3), (10, 5), (11, 5), (12, 5), (1, 4), (2, 4), (4, 4), (5, 2), (100, 128), (129, 128)]
)
def test_each_point_once_and_no_single_left_over(n: int, batch_size: int) -> None:
    parts = [y.tolist() for _, y in BatchLoader(numbered(n), batch_size).epoch(0)]
    assert len(parts) == number_of_batches(n, batch_size)
    seen = [label for part in parts for label in part]
    single = n > 1 and n % batch_size == 1
    assert len(seen) == len(set(seen)) == n - single
    assert all(len(part) == batch_size for part in parts[:-1])
    assert n == 1 or all(len(part) > 1 for part in parts)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    split = numbered(50, flip=True)

    def epoch(seed: int, number: int) -> tuple[Tensor, Tensor]:
        xs, ys = zip(*BatchLoader(split, 8, seed).epoch(number), strict=True)
        return torch.cat(xs), torch.cat(ys)

    x, y = epoch(3, 1)
    torch.rand(4)  # the global generator plays no part
    again = epoch(3, 1)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    for seed, number in ((3, 2), (4, 1), (1, 3)):
        assert not torch.equal(y, epoch(seed, number)[1])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (11, 5), (13, 12), (21, 8), (23, 8), (24, 8), (7, 16), (9, 16)])
def test_a_resumed_epoch_and_the_parts_of_processes(n: int, batch_size: int, number: int) -> None:
    split = numbered(n, flip=True)
    whole = list(BatchLoader(split, batch_size).epoch(1))
    parts = [list(BatchLoader(split, batch_size, rank=rank, world_size=number).epoch(1)) for rank in range(number)]
    # Left-over points are a batch if there are two for each process.
    assert {len(part) for part in parts} == {number_of_batches(n, batch_size, number)}
    assert number_of_batches(n, batch_size, number) == n // batch_size + (n % batch_size >= 2 * number)
    for shares, (x, y) in zip(zip(*parts, strict=True), whole, strict=False):
        assert torch.equal(torch.cat([part for part, _ in shares]), x)
        assert torch.equal(torch.cat([part for _, part in shares]), y)
        assert [len(part) for _, part in shares] == [len(part) for part in y.tensor_split(number)]
    for first in range(len(parts[-1]) + 1):
        rest = list(BatchLoader(split, batch_size, rank=number - 1, world_size=number).epoch(1, start=first))
        assert len(rest) == len(parts[-1]) - first
        for (x, y), (other_x, other_y) in zip(rest, parts[-1][first:], strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


def test_a_part_alone_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[int] = []
    monkeypatch.setattr("data._crop_and_flip", lambda images, *_: cut.append(len(images)) or images)
    list(BatchLoader(numbered(23), 8, rank=1, world_size=2).epoch(0, start=1))
    assert cut == [4, 3]


def test_the_batches_that_a_seed_has_always_had() -> None:
    x, y = next(BatchLoader(load_dataset("digits", "/nowhere").train, 16, 3).epoch(2))
    assert y.tolist() == [6, 1, 3, 8, 4, 7, 9, 9, 5, 3, 1, 2, 3, 6, 1, 3]
    assert digest(x) == "a824cd52e80a83d2"


def test_batches_are_pixels_of_their_labels() -> None:
    split = numbered(20, padding=0)
    for x, y in BatchLoader(split, 6).epoch(0):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, split.images[y].float() / 255, rtol=0, atol=0)


def cut(image: Tensor, padding: int, top: int, left: int, mirrored: bool) -> Tensor:
    """The crop of a zero-padded image (C, H, W), pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for row, column in product(range(height), range(width)):
        source_row, source_column = row + top - padding, column + left - padding
        if 0 <= source_row < height and 0 <= source_column < width:
            to = width - 1 - column if mirrored else column
            for channel in range(channels):
                out[channel, row, to] = image[channel, source_row, source_column]
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "padding"), [((3, 6, 5), 2), ((1, 4, 4), 1), ((3, 4, 7), 0)])
def test_augment_is_a_crop_perhaps_mirrored(shape: tuple[int, int, int], padding: int, flip: bool) -> None:
    image = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    offsets = range(2 * padding + 1)
    kinds = list(product(offsets, offsets, [False, True] if flip else [False]))
    expected = {cut(image, padding, *kind).numpy().tobytes(): kind for kind in kinds}
    assert len(expected) == len(kinds)
    n = 80 * len(kinds)
    split = Split(image.expand(n, *shape), torch.zeros(n, dtype=torch.int64), 255, padding, flip)
    out, _ = ShuffledTensors(split, torch.Generator().manual_seed(1))[:]
    assert out.shape == (n, *shape)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    counts = dict.fromkeys(kinds, 0)
    for one in out:
        counts[expected[one.numpy().tobytes()]] += 1  # a KeyError here: no crop of the image
    # Every crop is as likely as another: 80 of each, within five standard errors.
    assert all(abs(count - 80) < 45 for count in counts.values())


def test_augment_keeps_images_apart() -> None:
    images = torch.arange(1, 31, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 4, 4)
    split = Split(images, torch.arange(1, 31), 255, 1, True)
    out, labels = ShuffledTensors(split, torch.Generator().manual_seed(0))[:]
    for image, label in zip(out, labels, strict=True):
        assert set(image.unique().tolist()) <= {0, int(label)}
        assert torch.equal(image[0], image[1])


@pytest.mark.parametrize("n", [1, 23])
def test_workers_cut_the_same_batches(n: int) -> None:
    split = numbered(n, flip=True)
    loader = BatchLoader(split, 8)
    wanted = [(epoch, number) for epoch in (2, 0) for number in range(len(loader))]
    here = [loader.batches[item] for item in wanted]
    there = list(WorkerPool(loader.batches, 1, torch.device("cpu")).load(wanted))
    assert len(here) == len(there) == 2 * number_of_batches(n, 8)
    for (x, y), (other_x, other_y) in zip(here, there, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_a_split_on_another_device_goes_through_the_workers() -> None:
    # `meta` stands in for a GPU: the batches arrive there.
    for x, y in BatchLoader(numbered(10), 4, device=torch.device("meta")).epoch(0):
        assert (x.device.type, y.device.type, x.dtype) == ("meta", "meta", torch.float32)


@pytest.mark.parametrize("device", ["cpu:0", "cpu"])
def test_a_device_with_a_number_is_the_same_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.WorkerPool", None)
    assert len(list(BatchLoader(numbered(10), 4, device=torch.device(device)).epoch(0))) == 3


def test_cutting_on_a_device_never_waits_for_it() -> None:
    split = replace(
        numbered(10, flip=True), images=numbered(10).images.to("meta"), labels=torch.zeros(10, device="meta")
    )
    shapes = [x.shape[0] for x, _ in BatchLoader(split, 4, device=torch.device("meta")).epoch(0)]
    assert shapes == [4, 4, 2]


def test_digits_are_never_mirrored() -> None:
    train = load_dataset("digits", "/nowhere").train.take(100)
    drawn = 0
    for x, y in BatchLoader(train, 100).epoch(0):
        images = (x * train.levels).round().to(torch.uint8)
        allowed = {
            cut(image, 1, top, left, False).numpy().tobytes()
            for image in train.images
            for top, left in product(range(3), repeat=2)
        }
        assert all(image.numpy().tobytes() in allowed for image in images)
        drawn += len(y)
    assert drawn == 100


@pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR is not set")
def test_cifar10_files() -> None:
    cifar = load_dataset("cifar10", os.environ["CIFAR10_DIR"])
    assert cifar.shape == (3, 32, 32)
    for split, n in ((cifar.train, 50_000), (cifar.test, 10_000)):
        assert split.images.shape == (n, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert torch.bincount(split.labels).tolist() == [n // 10] * 10
        assert (split.levels, split.padding, split.flip) == (255, 4, True)


def pickled(path: Path, **content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("name", "labels", "meta"), [("cifar10", "labels", "batches.meta"), ("cifar100", "fine_labels", "meta")]
)
def test_cifar_is_read_from_its_files(
    name: str, labels: str, meta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    place, rows = tmp_path / kind.base_folder, torch.arange(3 * 3072).remainder(251).to(torch.uint8).view(3, 3072)
    for file, _ in kind.train_list + kind.test_list:
        pickled(place / file, data=rows.numpy(), **{labels: [4, 0, 7]})
    words = tuple(f"class {k}" for k in range(int(name.removeprefix("cifar"))))
    pickled(place / meta, **{kind.meta["key"]: list(words)})
    data = load_dataset(name, str(tmp_path))
    assert (data.name, data.class_names, data.num_classes, data.shape) == (name, words, len(words), (3, 32, 32))
    assert (len(data.train), len(data.test)) == (3 * len(kind.train_list), 3)
    assert data.test.labels.tolist() == [4, 0, 7]
    assert torch.equal(data.test.images.flatten(1), rows)
    assert (data.train.levels, data.train.padding, data.train.flip) == (255, 4, True)
    assert data.test.in_memory() is data.test


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError("no network")])
def test_failed_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, error: Exception
) -> None:
    from torchvision.datasets import CIFAR10

    def fail(self: CIFAR10) -> None:
        part = Path(self.root) / CIFAR10.base_folder
        part.mkdir(parents=True)
        (part / "data_batch_1").write_text("half")
        raise error

    monkeypatch.setattr(CIFAR10, "download", fail)
    folder = tmp_path / "data"
    if existed:
        folder.mkdir()
        (folder / "mine").write_text("keep")
    for name in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match=rf"{name} is not in .*--data_dir.*--dataset=digits"):
            load_dataset(name, str(folder))
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["data", "mine"] if existed else [])


def test_damaged_cifar10_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def forbidden(self: CIFAR10) -> None:
        raise AssertionError("downloaded over the user's files")

    monkeypatch.setattr(CIFAR10, "download", forbidden)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_1").write_text("half")
    with pytest.raises(ValueError, match=r"not whole.*--data_dir"):
        load_dataset("cifar10", str(tmp_path))
