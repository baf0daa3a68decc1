"""Extra images: their share in each batch, files that are mmap_npz, pickles that can't run code, a run that goes on."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from data import (
    BatchLoader,
    Dataset,
    Extra,
    FolderSplit,
    Mixed,
    Split,
    load_dataset,
    load_extra,
    mix,
    number_of_batches,
)
from utils.arrays import load_pickled_arrays, mmap_npz
from utils.checkpoint import newest_state

SIZES = [(40, 100, 8, 0.5), (43, 100, 8, 0.5), (41, 17, 12, 0.7), (30, 5, 10, 0.1), (5, 3, 64, 0.5), (20, 7, 2, 0.9)]
Batches = list[tuple[Tensor, Tensor]]


def numbered(n: int, first: int = 0, padding: int = 1) -> Split:
    """n images of 1 x 4 x 4 in one colour each, whose label tells the image."""
    images = (torch.arange(n) % 255 + 1).to(torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 4, 4)
    return Split(images, torch.arange(n) + first, levels=255, padding=padding, flip=True)


def mixed(n: int, n_extra: int, batch_size: int, fraction: float, padding: int = 1) -> Mixed:
    """Standard images with labels from 0, extra ones with labels from 1000."""
    extra = numbered(n_extra, 1000, padding)
    found = mix(numbered(n, 0, padding), Extra(*vars(extra).values(), file="none"), batch_size, fraction)
    assert isinstance(found, Mixed)
    return found


def same(one: Batches, other: Batches) -> bool:
    """To the bit."""
    return len(one) == len(other) and all(
        torch.equal(x, other_x) and torch.equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("n", "n_extra", "batch_size", "fraction"), SIZES)
def test_each_batch_has_its_share_and_an_epoch_each_standard_image_once(
    n: int, n_extra: int, batch_size: int, fraction: float
) -> None:
    split = mixed(n, n_extra, batch_size, fraction)
    extra = min(max(round(batch_size * fraction), 1), batch_size - 1)
    assert (split.standard_per_batch, split.extra_per_batch) == (batch_size - extra, extra)
    found = [y for _, y in BatchLoader(split, batch_size).epoch(3)]
    assert len(found) == number_of_batches(len(split), batch_size) == -(-n // (batch_size - extra))
    assert sum(map(len, found)) == len(split)
    assert sorted(label for y in found for label in y.tolist() if label < 1000) == list(range(n))
    for y in found[:-1]:
        assert (len(y), int((y >= 1000).sum())) == (batch_size, extra)
    last = found[-1] >= 1000
    assert 1 <= int(last.sum()) < len(last)
    assert abs(int(last.sum()) - (~last).sum() * extra / (batch_size - extra)) <= max(0.5, 1 - n % batch_size)


def test_the_published_setting() -> None:
    split = mixed(960, 5000, 128, 0.5)
    found = [int((y >= 1000).sum()) for _, y in BatchLoader(split, 128).epoch(0)]
    assert found == [64] * 15


@pytest.mark.parametrize("n_extra", [3, 37, 1000])
def test_every_extra_image_is_used_before_any_is_used_again(n_extra: int) -> None:
    split = mixed(30, n_extra, 8, 0.5)
    used = [
        label
        for epoch in range(6)
        for _, y in BatchLoader(split, 8, 5).epoch(epoch)
        for label in y.tolist()
        if label >= 1000
    ]
    assert len(used) == 6 * 30
    turns = [used[begin : begin + n_extra] for begin in range(0, len(used), n_extra)]
    assert all(len(set(turn)) == len(turn) for turn in turns)
    assert len(turns) == 1 or turns[0] != turns[1]
    assert turns[0] != sorted(turns[0])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "n_extra", "batch_size", "fraction"), SIZES)
def test_a_resumed_epoch_and_the_parts_of_processes(
    n: int, n_extra: int, batch_size: int, fraction: float, number: int
) -> None:
    split = mixed(n, n_extra, batch_size, fraction)
    whole = list(BatchLoader(split, batch_size).epoch(1))
    parts = [list(BatchLoader(split, batch_size, rank=rank, world_size=number).epoch(1)) for rank in range(number)]
    assert {len(part) for part in parts} == {number_of_batches(len(split), batch_size, number)}
    joined = [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in zip(*parts, strict=True)]
    assert same(joined, whole[: len(joined)])  # type: ignore[arg-type]
    for first in range(len(parts[-1]) + 1):
        rest = list(BatchLoader(split, batch_size, rank=number - 1, world_size=number).epoch(1, start=first))
        assert same(rest, parts[-1][first:])


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.8])
def test_every_part_and_piece_holds_both_kinds_in_proportion(fraction: float) -> None:
    split = mixed(100, 1000, 64, fraction)
    for _, y in BatchLoader(split, 64).epoch(0):
        share = float((y >= 1000).float().mean())
        for number in (2, 3, 8):
            for part in y.tensor_split(number):
                for piece in part.tensor_split(2):
                    assert abs(int((piece >= 1000).sum()) - share * len(piece)) < 1


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    split = mixed(50, 400, 16, 0.5)
    here = list(BatchLoader(split, 16, 3).epoch(1))
    torch.rand(3)  # the global generator plays no part
    assert same(list(BatchLoader(split, 16, 3).epoch(1)), here)
    for seed, epoch in ((3, 2), (4, 1)):
        there = list(BatchLoader(split, 16, seed).epoch(epoch))
        for kind in (False, True):
            ours, theirs = (torch.cat([y[(y >= 1000) == kind] for _, y in found]) for found in (here, there))
            assert not torch.equal(ours, theirs)


def test_standard_images_are_those_of_batches_without_extra_ones() -> None:
    split = mixed(50, 400, 16, 0.5)
    for (x, y), (plain_x, plain_y) in zip(
        BatchLoader(split, 16, 3).epoch(1), BatchLoader(split.standard, 8, 3).epoch(1), strict=True
    ):
        assert torch.equal(x[y < 1000], plain_x)
        assert torch.equal(y[y < 1000], plain_y)


def test_extra_images_are_augmented_and_keep_their_labels() -> None:
    split, seen = mixed(200, 10, 8, 0.5), set()
    for epoch in range(2):
        for x, y in BatchLoader(split, 8).epoch(epoch):
            for image, label in zip((x[y >= 1000] * 255).round().int(), y[y >= 1000], strict=True):
                assert set(image.unique().tolist()) <= {0, int(label) - 999}  # of its colour, and what pads it
                seen.add(tuple((image > 0).flatten().tolist()))
    assert len(seen) == 9  # padded by one pixel: at each of nine places, where one can't tell mirrored ones
    for x, y in BatchLoader(mixed(20, 10, 8, 0.5, padding=0), 8).epoch(0):
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y % 1000 + 1)


def test_a_worker_cuts_for_another_device() -> None:
    # `meta` stands in for a GPU: the batches arrive there.
    found = list(BatchLoader(mixed(20, 10, 8, 0.5), 8, device=torch.device("meta")).epoch(0))
    assert [(x.device.type, len(x), x.dtype) for x, _ in found] == [("meta", 8, torch.float32)] * 5


# Files


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", "")


def arrays(n: int = 30, levels: int = 16, shape: tuple[int, ...] = (8, 8, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,)."""
    draws = np.random.default_rng(n)
    return draws.integers(0, levels + 1, (n, *shape), dtype=np.uint8), draws.integers(0, 10, n)


def save(path: str | Path, image: Any, label: Any) -> str:
    np.savez(path, image=image, label=label)
    return str(path)


def has(extra: Extra, image: np.ndarray, label: np.ndarray) -> bool:
    return bool((extra.images.numpy() == image.transpose(0, 3, 1, 2)).all() and (extra.labels.numpy() == label).all())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("label", ["i8", "u1", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npz_is_a_split(order: str, label: str, digits: Dataset) -> None:
    image, labels = arrays()
    extra = load_extra(save("more.npz", np.asarray(image, order=order), labels.astype(label)), digits)  # type: ignore[call-overload]
    assert has(extra, image, labels)
    assert (extra.labels.dtype, extra.levels, extra.padding, extra.flip) == (torch.int64, 16, 1, False)
    assert len(list(BatchLoader(mix(digits.train.take(40), extra, 8, 0.5), 8).epoch(0))) == 10
    cut = extra.take(3)
    assert torch.equal(cut.images, extra.images[:3])
    assert not isinstance(cut, Extra)


def test_colour_images(digits: Dataset) -> None:
    image, label = arrays(20, 255, (32, 32, 3))
    standard = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 255, 4, True)
    extra = load_extra(save("more.npz", image, label), Dataset("cifar10", standard, standard, digits.class_names))
    assert has(extra, image, label)
    assert (extra.padding, extra.flip) == (4, True)


def test_an_npz_of_other_programs(digits: Dataset) -> None:
    """A header of another version, and lengths in the member's own header that differ from those in the directory."""
    image, label = arrays()
    for name, array in (("image", image), ("label", label)):
        with Path(f"{name}.npy").open("wb") as file:
            np.lib.format.write_array(file, array, version=(2, 0))
    with zipfile.ZipFile("more.npz", "w") as archive:
        archive.writestr("about.txt", "first")
        for name in ("label", "image"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(Path(f"{name}.npy").read_bytes())
    assert has(load_extra("more.npz", digits), image, label)


class SparseController(io.FileIO):
    """A file in which zeros take no room."""

    def write(self, data: Any) -> int:
        if len(data) > 10_000 and not np.frombuffer(data, np.uint8).any():
            self.seek(len(data), 1)
            return len(data)
        return super().write(data)


def anonymous_memory() -> int:
    """Of this process, without mmap_npz files, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def test_images_are_mapped_not_read(digits: Dataset) -> None:
    n, zeros = 700_000, bytes(8_601_600)
    with SparseController("large.npz", "w") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for _ in range(250):
                member.write(zeros)
        with archive.open("label.npy", "w") as member:
            np.lib.format.write_array(member, np.arange(n, dtype=np.uint8) % 10)
    assert Path("large.npz").stat().st_size > 2**31
    standard = Split(torch.zeros(90, 3, 32, 32, dtype=torch.uint8), torch.zeros(90, dtype=torch.int64), 255, 4, True)
    before = anonymous_memory()
    extra = load_extra("large.npz", Dataset("cifar10", standard, standard, digits.class_names))
    assert extra.content.startswith("700000 images ")
    assert sum(len(y) for _, y in BatchLoader(mix(standard, extra, 30, 0.5), 30).epoch(0)) == 180
    assert anonymous_memory() - before < 50e6
    assert isinstance(mmap_npz(Path("large.npz"), "image")[0], np.memmap)
    # A worker that is not forked gets the file's name.
    assert len(pickle.dumps(extra)) < 1000
    again = pickle.loads(pickle.dumps(extra))
    assert len(again) == n
    assert torch.equal(again.labels, extra.labels)


@pytest.mark.skipif(not (shutil.which("zip") and shutil.which("unzip")), reason="zip and unzip are not installed")
def test_a_compressed_npz_comes_with_a_command(digits: Dataset) -> None:
    image, label = arrays()
    np.savez_compressed("more.npz", image=image, label=label)
    with pytest.raises(ValueError, match="compressed") as error:
        load_extra("more.npz", digits)
    command = str(error.value).partition("copy: ")[2]
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert has(load_extra("plain.npz", digits), image, label)


def ours(protocol: int, **content: Any) -> bytes:
    return pickle.dumps(content, protocol=protocol)


def as_numpy_1(data: bytes) -> bytes:
    """The pickle that numpy 1 would have written."""
    if data[2:3] == b"\x95":
        data = data[:2] + data[11:]  # the length of a frame, which may be left out
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        short = name.replace(b"_core", b"core")
        data = data.replace(b"\x8c%c%b" % (len(name), name), b"\x8c%c%b" % (len(short), short)).replace(name, short)
    return data


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_any_protocol(protocol: int, numpy: int, digits: Dataset) -> None:
    image, label = arrays()
    views = [image, np.asfortranarray(image), image[::2], image.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)]
    for images in views:
        labels = label[: len(images)]
        # As the published file has it: with more beside.
        more = {"ti_index": list(np.arange(3)), "prediction_model": "a.pt", "prediction_model_epoch": 199, "p": 0.5}
        data = ours(protocol, data=images, extrapolated_targets=labels, **more)
        if numpy == 1:
            data = as_numpy_1(data)
            assert b"numpy.core" in data
            assert b"_core" not in data
        Path("more.pickle").write_bytes(data)
        extra = load_extra("more.pickle", digits)
        assert has(extra, images, labels)
        assert extra.content == load_extra(save("more.npz", images, labels), digits).content


def test_a_pickle_of_python_2() -> None:
    data = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03\x85"
    )
    data += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x01\x80\xfftbs."
    Path("old.pickle").write_bytes(data)
    assert load_pickled_arrays(Path("old.pickle"), "data")[0].tolist() == [1, 128, 255]


class Calls:
    """Unpickled, it calls something."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


HARMFUL = {
    "builtins.eval": Calls(eval, "__import__('pathlib').Path('ran').touch()"),
    "posix.system": Calls(__import__("os").system, "touch ran"),
    "builtins.getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    "functools.partial": Calls(functools.partial, eval),
    "'O8'": np.array([{}, None]),
    "'V": np.zeros(3, dtype=[("a", "u1")]),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("word", HARMFUL)
def test_no_pickle_runs_code(word: str, protocol: int, digits: Dataset) -> None:
    image, label = arrays()
    Path("more.pickle").write_bytes(ours(protocol, more=HARMFUL[word], data=image, extrapolated_targets=label))
    with pytest.raises(ValueError, match=r"more\.pickle") as error:
        load_extra("more.pickle", digits)
    if protocol > 2 or not word.startswith("builtins"):  # which protocol 2 gives another name
        assert word in str(error.value)
    assert not Path("ran").exists()


def test_a_dtype_that_lies_about_its_objects_is_refused() -> None:
    """With numpy's own functions this one makes an object of an address that the file chose."""
    setstate = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85"
    )
    data += b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R" + setstate + b"\x89U\x08AAAAAAAAtbs."
    Path("lies.pickle").write_bytes(data)
    with pytest.raises(ValueError, match="only numbers are read"):
        load_pickled_arrays(Path("lies.pickle"), "data")


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_damaged_files_are_refused_or_read(kind: str) -> None:
    draws, (image, label) = random.Random(0), arrays(5)
    save("good.npz", image, label)
    good = Path("good.npz").read_bytes() if kind == "npz" else ours(4, image=image, label=label)
    read, refused, path = mmap_npz if kind == "npz" else load_pickled_arrays, 0, Path("bad")
    for number in range(400):
        data = bytearray(good)
        for _ in range(draws.randrange(1, 4)):
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.unlink(missing_ok=True)  # one that is mmap_npz is not to change
        path.write_bytes(data if number % 2 else good[: draws.randrange(len(good))])
        try:
            read(path, "image", "label")
        except ValueError:
            refused += 1
    assert refused > 200


# Usage errors: a file, data set and flags beside it, and words of the error

IMAGE, LABEL = arrays()
WRONG: dict[str, tuple[Any, list[str], list[str]]] = {
    "missing": (None, [], ["missing"]),
    "neither": (b"<html>", [], ["pickle"]),
    "empty": (b"", [], ["pickle"]),
    "a broken npz": (b"PK\3\4 and no more", [], ["npz", "damaged"]),
    "compressed": ("compressed", [], ["compressed", "zip -0"]),
    "labels too large": ((IMAGE, LABEL + 1), [], ["labels from 1 to 10", "0 to 9"]),
    "labels below 0": ((IMAGE, LABEL - 1), [], ["labels from -1"]),
    "labels of floats": ((IMAGE, LABEL.astype(float)), [], ["labels of float64", "integers"]),
    "too few labels": ((IMAGE, LABEL[:-1]), [], ["30 images", "(29,)"]),
    "soft labels": ((IMAGE, np.eye(10, dtype=int)[LABEL]), [], ["labels", "(30, 10)"]),
    "images of floats": ((IMAGE / 16, LABEL), [], ["images of float64", "uint8"]),
    "channels first": ((IMAGE.reshape(30, 1, 8, 8), LABEL), [], ["(30, 1, 8, 8)", "(N, 8, 8, 1)"]),
    "flat images": ((IMAGE.reshape(30, 64), LABEL), [], ["(30, 64)"]),
    "one number": ((np.uint8(3), LABEL), [], ["()"]),
    "CIFAR-10's": ((np.zeros((3, 32, 32, 3), np.uint8), LABEL[:3]), [], ["(N, 8, 8, 1)", "digits"]),
    "too bright": ((IMAGE + 1, LABEL), [], ["pixels up to 17", "16"]),
    "no image": ((IMAGE[:0], LABEL[:0]), [], ["no images"]),
    "objects": ((np.array([Calls(eval, "Path('ran').touch()")]), LABEL), [], ["Python objects"]),
    "no label": ({"image": IMAGE, "labels": LABEL}, [], ["no array 'label'", "'image', 'labels'"]),
    "no data": (ours(4, image=IMAGE, label=LABEL), [], ["no array 'data'"]),
    "a list": (
        ours(4, data=IMAGE, extrapolated_targets=LABEL.tolist()),
        [],
        ["'extrapolated_targets'", "not an array"],
    ),
    "no dictionary": (pickle.dumps([1]), [], ["no dictionary"]),
    "code": (ours(4, data=Calls(eval, "Path('ran').touch()")), [], ["builtins.eval", "refused"]),
}
FLAGS = ["--dataset=digits", "--device=cpu", "--threads=1", "--width=4", "--batch_size=16"]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_a_usage_error(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, flags, words = WRONG[case]
    match content:
        case bytes():
            Path("more").write_bytes(content)
        case dict():
            np.savez("more", **content)
            Path("more.npz").rename("more")
        case "compressed":
            np.savez_compressed("more", image=IMAGE, label=LABEL)
            Path("more.npz").rename("more")
        case (image, label):
            Path(save("more.npz", image, label)).rename("more")
    refused(
        [*FLAGS, f"--extra_data={'more' if content is not None else 'missing'}", *flags], capsys, "--extra_data", *words
    )
    assert not Path("ran").exists()
    assert not Path("runs").exists()


def refused(flags: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """With a line that has these words."""
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_flags_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    more = f"--extra_data={save('more.npz', IMAGE, LABEL)}"
    refused([*FLAGS, "--extra_fraction=0.5"], capsys, "--extra_fraction", "--extra_data")
    refused([*FLAGS, more, "--extra_fraction=1"], capsys, "--extra_fraction", "above 0 and below 1")
    refused([*FLAGS, more, "--batch_size=1"], capsys, "--batch_size", "two images")


def test_folders_of_images_take_none(digits: Dataset) -> None:
    files = FolderSplit(["a.jpg"], torch.zeros(1, dtype=torch.int64), 8, lambda image: image)
    for name in ("imagenet", "imagefolder"):
        with pytest.raises(ValueError, match=rf"{name} takes no extra images; cifar10"):
            load_extra("more.npz", Dataset(name, files, files, digits.class_names))


# Runs

RUN = [*FLAGS, "--n_ex_train=60", "--attack=apgd", "--l_norms=Linf L1", "--at_iter=2", "--epochs=3"]
RUN += ["--save_every=0.00001", "--accumulate=2", "--extra_fraction=0.4"]


def test_a_run_that_was_cut_off_goes_on_with_a_file_that_has_moved(
    cut_off: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    more = save("more.npz", *arrays(50))
    whole = train.main([*RUN, f"--extra_data={more}"])
    # 6 of 16 are extra: 60 of the data set's own, ten a batch.
    config = json.loads((whole / "config.json").read_text())
    assert (config["extra_data"], config["extra_fraction"]) == ("more.npz", 0.4)
    assert config["extra_content"].startswith("50 images ")
    cut_off(9, *RUN, f"--extra_data={more}", "--save_dir=cut")
    [cut] = Path("cut").iterdir()
    assert newest_state(cut)[0].name.startswith("state_0001_000003-")  # type: ignore[union-attr]
    capsys.readouterr()
    Path("elsewhere").mkdir()
    Path(more).rename("elsewhere/more.npz")
    save("other.npz", *arrays(51))
    refused([f"--resume={cut}"], capsys, "--extra_data", "more.npz")
    refused([f"--resume={cut}", "--extra_data=other.npz"], capsys, "--resume", "another extra_content")
    refused([f"--resume={cut}", "--extra_data="], capsys, "--extra_data", "it is empty")
    moved = f"--extra_data=elsewhere/{more}"
    refused([f"--resume={cut}", moved, "--extra_fraction=0.5"], capsys, "--resume", "another extra_fraction")
    assert train.main([f"--resume={cut}", moved]) == cut
    ours, theirs = (torch.load(folder / "ep_3.pth", weights_only=True)["state_dict"] for folder in (cut, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    records = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (cut, whole)
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 3


def test_resume_alone_begins_a_run_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the extra images it is another command, and its share of each batch has a default."""
    flags = [*FLAGS, "--n_ex_train=32", "--epochs=1", "--resume"]
    with_more = train.main([*flags, f"--extra_data={save('more.npz', IMAGE, LABEL)}"])
    assert json.loads((with_more / "config.json").read_text())["extra_fraction"] == 0.5
    assert train.main(flags) != with_more
    assert "there is no run of this command" in capsys.readouterr().out
