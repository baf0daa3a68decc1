"""Folders of images: the layout, batches that depend on nothing but (seed, epoch, point), the test images, an evaluation."""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import eval as eval_script
import train as train_script
from data import BatchLoader, FolderSplit, _fixed_order, load_dataset, number_of_batches, on_device

SIZE = 16
CPU = torch.device("cpu")
Launch = Callable[..., ForkServerProcess]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # with 2 workers on a machine of one core


def save_image(path: Path, seed: int, mode: str = "RGB") -> None:
    """Noise of a size of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    height, width = draws.integers(20, 40, 2)
    Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes: 12, 6 and 3 images to train, 4, 2 and 1 to test; PNG and JPEG, in colour, grey, with a palette or transparent."""
    modes = [("png", "RGB"), ("jpg", "RGB"), ("jpg", "L"), ("png", "P"), ("png", "RGBA")]
    for part, share in (("train", 3), ("val", 1)):
        for name, n in (("ant", 4), ("bee", 2), ("cat", 1)):
            for i in range(n * share):
                ending, mode = modes[i % len(modes)]
                save_image(
                    tmp_path / "images" / part / name / f"{i}.{ending}", 100 * len(name + part) + 10 * n + i, mode
                )
    return tmp_path / "images"


@pytest.fixture
def train(folder: Path) -> FolderSplit:
    """The training images; the label tells the image."""
    split = load_dataset("imagefolder", str(folder), SIZE).train
    assert isinstance(split, FolderSplit)
    return FolderSplit(split.files, torch.arange(len(split)), split.size, split.prepare)


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """To the bit."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(x, other_x) and torch.equal(y, other_y) for (x, y), (other_x, other_y) in pairs)


@pytest.mark.parametrize("name", ["imagenet", "imagefolder"])
def test_a_folder_is_a_data_set(name: str, folder: Path) -> None:
    data = load_dataset(name, str(folder), SIZE)
    assert (data.name, data.class_names, data.num_classes, data.shape) == (
        name,
        ("ant", "bee", "cat"),
        3,
        (3, SIZE, SIZE),
    )
    assert (len(data.train), len(data.test)) == (21, 7)
    assert on_device(data.train, torch.device("meta")) is data.train
    for split in (data.train, data.test):
        assert isinstance(split, FolderSplit)
        assert [data.class_names[label] for label in split.labels] == [Path(file).parent.name for file in split.files]
        assert split.take(3).files == split.files[:3]
    assert load_dataset(name, str(folder)).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("no folder", ["train", "nothing", "downloaded"]),
        ("no val", ["images/val", "--data_dir"]),
        ("no classes", ["class folder", "val/CLASS"]),
        ("an empty class", ["no images, such as bee", "val/CLASS"]),
        ("a class more", ["dog (only in val)", "1 differ", "--data_dir"]),
        ("other names", ["6 differ", "ant (only in train)"]),
    ],
)
def test_another_layout_is_explained(odd: str, words: list[str], folder: Path) -> None:
    val = folder / "val"
    match odd:
        case "no folder":
            folder = folder / "nothing"
        case "no val":
            val.rename(folder / "test")
        case "no classes":
            val.rename(folder / "test")
            val.mkdir()
        case "an empty class":
            for file in (val / "bee").iterdir():
                file.unlink()
        case "a class more":
            save_image(val / "dog" / "1.png", 0)
        case "other names":
            for place in list(val.iterdir()):
                place.rename(val / f"the {place.name}")
    with pytest.raises(ValueError, match=r"imagenet|same classes") as error:
        load_dataset("imagenet", str(folder), SIZE)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("counts", [[50] * 40, [7, 300, 1, 90]])
def test_every_beginning_of_the_fixed_order_has_the_classes_in_proportion(counts: list[int]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = _fixed_order(labels)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(order, _fixed_order(labels))
    assert order.sort().values.tolist() == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        found = labels[order[:n]].bincount(minlength=len(counts))
        assert float((found - n * torch.tensor(counts) / len(labels)).abs().max()) < 2
    if len(set(counts)) == 1:
        assert labels[order[: len(counts)]].unique().tolist() == list(range(len(counts)))
    # Within a class the order is random, too.
    first = order[labels[order] == 1]
    assert first.tolist() != sorted(first.tolist())


def test_images_in_memory_are_torchvisions(folder: Path) -> None:
    data = load_dataset("imagefolder", str(folder), 32)
    change = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor()])
    theirs = {file: (change(image), label) for (file, _), (image, label) in both(ImageFolder(folder / "val"))}
    split = data.test.take(5).in_memory()
    assert (split.images.dtype, split.images.shape, split.levels) == (torch.uint8, (5, 3, 32, 32), 255)
    assert isinstance(data.test, FolderSplit)
    for file, image, label in zip(data.test.files, split.images, split.labels.tolist(), strict=False):
        assert torch.equal(image, theirs[file][0])
        assert label == theirs[file][1]
    x, y = data.test.take(5).pixels()
    assert torch.equal(x, split.images.float() / 255)
    assert torch.equal(y, split.labels)


def both(images: ImageFolder) -> Iterator[tuple[tuple[str, int], tuple[Image.Image, int]]]:
    """Files and what torchvision reads from them."""
    return ((images.samples[i], images[i]) for i in range(len(images)))


def test_test_images_in_a_way_of_ones_own(folder: Path) -> None:
    data = load_dataset("imagenet", str(folder), 224, v2.CenterCrop(24))
    assert data.shape == data.test.take(2).in_memory().shape == (3, 24, 24)


def test_only_the_first_files_are_read(folder: Path) -> None:
    data = load_dataset("imagefolder", str(folder), SIZE)
    assert isinstance(data.test, FolderSplit)
    for file in data.test.files[2:]:
        Path(file).write_text("no image")
    assert len(data.test.take(2).in_memory()) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_whoever_reads_them(workers: int, train: FolderSplit) -> None:
    state = torch.get_rng_state()
    here = list(BatchLoader(train, 4, 3, workers=0).epoch(1))
    assert same(list(BatchLoader(train, 4, 3, workers=workers).epoch(1)), here)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same(list(BatchLoader(train, 4, 3, workers=0).epoch(1)), here)
    for x, y in here:
        assert (x.dtype, x.shape, x.is_contiguous()) == (torch.float32, (len(y), 3, SIZE, SIZE), True)
        assert float(x.min()) >= 0
        assert 0.5 < float(x.max()) <= 1
    assert len({label for _, y in here for label in y.tolist()}) == sum(len(y) for _, y in here) == 20


def test_an_images_part_depends_on_seed_epoch_and_point(train: FolderSplit) -> None:
    def images(seed: int, epoch: int, batch_size: int = 7, n: int = 21) -> dict[int, Tensor]:
        parts = BatchLoader(train.take(n), batch_size, seed, workers=0).epoch(epoch)
        return {label: image for x, y in parts for label, image in zip(y.tolist(), x, strict=True)}

    one = images(0, 0)
    for again in (images(0, 0, batch_size=3), images(0, 0, n=14)):
        assert all(torch.equal(image, one[label]) for label, image in again.items())
    for seed, epoch in ((0, 1), (1, 0)):
        other = images(seed, epoch)
        assert list(other) != list(one)
        assert not any(torch.equal(other[label], one[label]) for label in one)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("n", "batch_size"), [(21, 8), (21, 6), (19, 6), (5, 16)])
def test_a_resumed_epoch_and_the_parts_of_processes(
    n: int, batch_size: int, number: int, train: FolderSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = train.take(n)
    whole = list(BatchLoader(split, batch_size, workers=0).epoch(1))
    parts = [
        list(BatchLoader(split, batch_size, rank=rank, world_size=number, workers=0).epoch(1)) for rank in range(number)
    ]
    assert {len(part) for part in parts} == {number_of_batches(n, batch_size, number)}
    joined = [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in zip(*parts, strict=True)]
    assert same(joined, whole[: len(joined)])  # type: ignore[arg-type]
    read: list[str] = []
    from data import _read_image

    monkeypatch.setattr("data._read_image", lambda file, change: read.append(file) or _read_image(file, change))
    rest = list(BatchLoader(split, batch_size, rank=number - 1, world_size=number, workers=0).epoch(1, start=1))
    assert same(rest, parts[-1][1:])
    assert read == [split.files[label] for _, y in rest for label in y.tolist()]


def test_signals_do_not_end_workers(train: FolderSplit) -> None:
    loader = BatchLoader(train, 2, workers=2)
    parts = loader.epoch(0)
    found = [next(parts)]
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        assert child.pid
        for number in ("INT", "TERM"):
            subprocess.run(["kill", f"-{number}", str(child.pid)], check=True)
    assert same(found + list(parts), list(BatchLoader(train, 2, workers=0).epoch(0)))
    list(loader.epoch(1))
    assert multiprocessing.active_children() == children  # they stay for the next epoch
    loader.close()
    assert not multiprocessing.active_children()


def test_an_epoch_that_is_left_early_leaves_no_worker(train: FolderSplit) -> None:
    loader = BatchLoader(train, 2, workers=1)
    parts = loader.epoch(0)
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert same(list(loader.epoch(1)), list(BatchLoader(train, 2, workers=0).epoch(1)))
    loader.close()
    assert not multiprocessing.active_children()


def test_a_script_that_fails_between_batches_ends_at_once(folder: Path) -> None:
    # The traceback keeps the workers alive until the interpreter ends.
    script = (
        "from data import BatchLoader, load_dataset\n"
        f"for x, y in BatchLoader(load_dataset('imagefolder', {str(folder)!r}, 16).train, 2, workers=1).epoch(0):\n"
        "    raise OSError('disk full')\n"
    )
    root = Path(eval_script.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "OSError: disk full"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", ["text", "cut", "gone"])
def test_a_broken_file_is_named(content: str, workers: int, train: FolderSplit) -> None:
    file = Path(next(file for file in train.files if file.endswith("ant/0.png")))
    match content:
        case "text":
            file.write_text("<html>")
        case "cut":
            file.write_bytes(file.read_bytes()[:300])
        case "gone":
            file.unlink()
    with pytest.raises(ValueError, match=r"ant/0\.png can't be read as an image"):
        list(BatchLoader(train, 4, workers=workers).epoch(0))
    gc.collect()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"ant/0\.png can't be read as an image"):
        train.in_memory()


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An evaluation of a small network of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3))\n"
    )
    return ["--dataset=imagefolder", f"--data_dir={folder}", "--model_name=nets.py:make", "--device=cpu"]


def test_an_evaluation_of_a_folder(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*command, f"--image_size={SIZE}"]
    results = eval_script.main([*small, "--attacks=fast", "--n_iter=4", "--n_ex=5"])
    content = json.loads((results / "eval.json").read_text())
    assert content["accuracy"]["union"]["points"] == 5
    assert list(content["norms"]) == ["Linf", "L2", "L1"]
    assert content["settings"]["l_eps"] == [4 / 255, 2.0, 255.0]
    assert content["settings"]["image_size"] == SIZE
    assert (results / "report.html").exists()
    # Going on needs the same points, not the same name alone.
    again = [*small, "--attacks=fast", "--n_iter=4", "--n_ex=5", "--resume"]
    assert eval_script.main(again) == results
    for change in ([f"--image_size={SIZE + 1}"], []):
        if not change:
            for file in (folder / "val" / "ant").iterdir():
                save_image(file, 7)
        with pytest.raises(SystemExit):
            eval_script.main([*again, *change])
        assert "images differ" in capsys.readouterr().err


def test_an_evaluation_of_all_clean_points_at_224_pixels(command: list[str]) -> None:
    results = eval_script.main([*command, "--only_clean"])
    content = json.loads((results / "eval.json").read_text())
    assert content["accuracy"]["clean"]["points"] == 7
    assert content["settings"]["image_size"] == 224


def test_fine_tuning_on_a_folder_is_killed_and_goes_on(command: list[str], folder: Path, launch: Launch) -> None:
    """With ImageNet's published settings and two reading processes; eval.py knows the size of its images then."""
    flags = ["--dataset=imagenet", *command[1:], f"--image_size={SIZE}", "--finetune_model", "--attack=apgd"]
    flags += ["--batch_size=2", "--workers=2", "--save_every=0.00001", "--threads=1", "--eval_freq=1", "--n_ex_eval=3"]
    processes = [launch(*flags, f"--save_dir={name}") for name in ("whole", "cut")]
    deadline = time.monotonic() + 180
    while not list(Path("cut").glob("*/state_0000_000004-*.pth")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    processes[1].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    [cut], [whole] = Path("cut").iterdir(), Path("whole").iterdir()
    assert not (cut / "metrics.jsonl").exists()
    train_script.main([f"--resume={cut}", "--model_name=nets.py:make", "--workers=1"])
    ours, theirs = (torch.load(path / "ep_1.pth", weights_only=True) for path in (cut, whole))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    [record], [other] = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (cut, whole)
    )
    assert (record["norms"], record["eval"]) == (other["norms"], other["eval"])
    config = json.loads((cut / "config.json").read_text())
    assert (config["epochs"], config["lr_max"], config["weight_decay"], config["l_iters"]) == (1, 0.005, 1e-4, [5, 15])
    assert config["l_eps"] == [4 / 255, 255.0]
    results = eval_script.main([f"--data_dir={folder}", f"--model_name=nets.py:make@{cut}/ep_1.pth", "--only_clean"])
    assert json.loads((results / "eval.json").read_text())["settings"]["image_size"] == SIZE


def test_a_checkpoint_tells_data_set_and_image_size(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import build_model

    spec = {"arch": "preact-resnet18", "num_classes": 3, "width": 4}
    content = {"spec": spec, "state_dict": build_model(**spec).state_dict(), "epoch": 1, "dataset": "imagefolder"}
    torch.save(content | {"image_size": SIZE}, "ep_1.pth")
    results = eval_script.main([f"--data_dir={folder}", "--model_name=ep_1.pth", "--only_clean", "--device=cpu"])
    assert json.loads((results / "eval.json").read_text())["settings"]["image_size"] == SIZE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_dir=."], ["--data_dir", "train/CLASS"]),
        (["--dataset=digits", "--image_size=32"], ["--image_size", "leave this flag out"]),
        (["--image_size=0"], ["--image_size", "at least 1"]),
        (["--n_ex=8"], ["--n_ex", "7 test images"]),
        (["--n_ex=7", "broken"], ["--data_dir", "cat/0.png can't be read"]),
    ],
)
def test_usage_errors(
    flags: list[str], words: list[str], command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "broken" in flags:
        (folder / "val" / "cat" / "0.png").write_text("<html>")
    with pytest.raises(SystemExit) as stop:
        eval_script.main([*command, *(flag for flag in flags if flag != "broken")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not Path("results").exists()
