"""Image files as people have them: true values or an error that names the file, nothing that hangs, and the order of classes is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train as train_script
from data import FolderSplit, load_dataset
from utils.image_files import ImageError, classes_in_words, read_image

NET = """
import torch


def make(num_classes=2):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, num_classes))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET)


def folders(*names: str, parts: tuple[str, ...] = ("train", "val"), n: int = 4) -> Path:
    """Class folders of grey images of 16 x 16 pixels, a value for each class."""
    for part in parts:
        for number, name in enumerate(names):
            Path("images", part, name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (16, 16), (20 * number,) * 3).save(Path("images", part, name, f"{i}.png"))
    return Path("images")


def evaluated(*flags: str) -> Path:
    quick = [
        "--dataset=imagefolder",
        "--data_dir=images",
        "--image_size=16",
        "--model_name=nets.py:make",
        "--device=cpu",
    ]
    return eval_script.main([*quick, "--only_clean", *flags])


VALUES = np.array([[0, 1, 77], [128, 254, 255]], dtype=np.uint8)

# How the same values are stored: an array, the ending of the file.
STORED = {
    "8 bits": (VALUES, "png"),
    "16 bits": (VALUES.astype(np.uint16) * 257, "png"),
    "16 bits, TIFF": (VALUES.astype(np.uint16) * 257, "tiff"),
    "16 bits, big-endian": ((VALUES.astype(np.uint16) * 257).astype(">u2"), "tiff"),
    "float": ((VALUES / 255).astype(np.float32), "tiff"),
    "bmp": (VALUES, "bmp"),
    "webp": (np.stack([VALUES] * 3, 2), "png"),
}


@pytest.mark.parametrize("kind", STORED)
def test_true_values(kind: str) -> None:
    array, ending = STORED[kind]
    Image.fromarray(array).save(f"x.{ending}")
    image = read_image(f"x.{ending}")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([VALUES] * 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_made_rgb_as_pillow_does(mode: str) -> None:
    ending = {"CMYK": "jpg", "YCbCr": "jpg", "PA": "tiff"}.get(mode, "png")
    image = Image.fromarray(np.stack([VALUES] * 3, 2)).convert("RGB" if mode == "PA" else mode)
    (image.convert("P") if mode == "PA" else image).save(f"x.{ending}")
    with Image.open(f"x.{ending}") as saved:
        assert np.array_equal(np.asarray(read_image(f"x.{ending}")), np.asarray(saved.convert("RGB")))


def refused_files() -> dict[str, bytes | np.ndarray]:
    return {
        "text.png": b"<html>",
        "empty.jpg": b"",
        "levels.tiff": VALUES.astype(np.float32),
        "nan.tiff": np.full((2, 2), np.nan, np.float32),
        "int32.tiff": VALUES.astype(np.int32),
        "negative.tiff": -(VALUES / 255).astype(np.float32),
    }


@pytest.mark.parametrize("name", refused_files())
def test_what_has_no_true_values_is_refused_by_name(name: str) -> None:
    content = refused_files()[name]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        Image.fromarray(content).save(name)
    with pytest.raises(ImageError, match=rf"{name} can't be read as an image"):
        read_image(name)


def test_hidden_and_special_files_are_left_out() -> None:
    folder = folders("a", "b")
    for hidden in (".cache", ".ipynb_checkpoints"):
        (folder / "train" / hidden).mkdir()
        (folder / "train" / hidden / "0.png").write_text("no image")
    (folder / "val" / "a" / "._0.png").write_text("macOS")
    (folder / "val" / "a" / ".thumbs").mkdir()
    (folder / "val" / "a" / ".thumbs" / "1.png").write_text("no image")
    (folder / "val" / "a" / "notes.txt").write_text("no image")
    os.mkfifo(folder / "val" / "b" / "pipe.png")  # who opens it waits for ever
    (folder / "val" / "b" / "round").symlink_to(folder.absolute() / "val" / "b")
    (folder / "val" / "b" / "gone.png").symlink_to("nowhere.png")
    (folder / "val" / "b" / "inner").mkdir()
    (folder / "val" / "b" / "inner" / "deep.png").write_bytes((folder / "val" / "b" / "0.png").read_bytes())
    data = load_dataset("imagefolder", str(folder), 16)
    assert data.class_names == ("a", "b")
    assert isinstance(data.test, FolderSplit)
    names = sorted(str(Path(file).relative_to(folder / "val")) for file in data.test.files)
    assert names == [*(f"a/{i}.png" for i in range(4)), *(f"b/{i}.png" for i in range(4)), "b/inner/deep.png"]
    assert len(data.test.in_memory()) == 9


def test_the_order_of_classes_is_said_and_can_be_that_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    folders(*(str(number) for number in range(11)))
    Path("nets.py").write_text(NET.replace("num_classes=2", "num_classes=11"))
    evaluated()
    out = capsys.readouterr().out
    assert "11 classes in the order of their names: 0 1 10 2 ...; they are numbers, --class_order=numeric" in out
    evaluated("--class_order=numeric")
    assert "11 classes in the order of their numbers: 0 1 2 3 ..." in capsys.readouterr().out
    data = load_dataset("imagefolder", "images", 16, class_order="numeric")
    images, labels = data.test.in_memory().images, data.test.labels
    assert torch.equal(images[:, 0, 0, 0].long(), 20 * labels)
    Path("images/val/ten").mkdir()
    with pytest.raises(SystemExit):
        evaluated("--class_order=numeric")
    assert "the classes are not all numbers, such as 'ten'" in capsys.readouterr().err
    assert classes_in_words(["01", "02"], "name") == "2 classes in the order of their names: 01 02"


def test_val_alone_evaluates_and_does_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    folders("a", "b", parts=("val",))
    assert (evaluated() / "eval.json").exists()
    with pytest.raises(SystemExit) as stop:
        train_script.main(
            ["--dataset=imagefolder", "--data_dir=images", "--image_size=16", "--arch=nets.py:make", "--epochs=1"]
        )
    assert stop.value.code == 2
    assert "there is no folder train/ in images: only eval.py can do without" in capsys.readouterr().err


TRAIN = ["--dataset=imagefolder", "--data_dir=images", "--image_size=16", "--arch=nets.py:make", "--device=cpu"]
TRAIN += ["--attack=apgd", "--l_norms=Linf L1", "--at_iter=2", "--batch_size=4", "--threads=1"]


@pytest.mark.parametrize("part", ["train", "val"])
def test_check_images_finds_them_before_training(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders("a", "b")
    train_script.main([*TRAIN, "--epochs=1", "--check_images", "--save_dir=good"])
    for i in (1, 2):
        (folder / part / "b" / f"{i}.png").write_text("<html>")
    with pytest.raises(SystemExit) as stop:
        train_script.main([*TRAIN, "--epochs=1", "--check_images"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert f"{part}/b/" in error
    assert "(and 1 other files)" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_met_while_training_gives_one_line(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders("a", "b")
    (folder / "train" / "b" / "1.png").write_text("<html>")
    with pytest.raises(SystemExit) as stop:
        train_script.main([*TRAIN, "--epochs=1", f"--workers={workers}"])
    [line] = str(stop.value.code).splitlines()
    assert "train/b/1.png can't be read as an image" in line
    assert "the last good state is runs/" in line
    assert "resume with: python" in line
    assert not list(Path("runs").rglob("error.txt"))


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run."""
    return [
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_process_that_is_killed(method: str) -> None:
    """Under each start method; they do not end by SIGTERM of others, and stay from epoch to epoch."""
    folders("a", "b")
    root = Path(train_script.__file__).parent
    Path("run.py").write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(root)!r})\nimport train\n"
        f"if __name__ == '__main__':\n    multiprocessing.set_start_method({method!r})\n"
        f"    train.main({[*TRAIN, '--epochs=1000', '--workers=2', '--save_every=100000']!r})\n"
    )
    with Path("out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "run.py"], stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 120
            while Path("out").read_text().count("epoch ") < 4 and time.monotonic() < deadline:
                time.sleep(0.2)
                assert process.poll() is None, Path("out").read_text()
            before = workers_of(process.pid)
            assert len(before) == 2, Path("out").read_text()
            seen = Path("out").read_text().count("epoch ")
            for pid in before:
                os.kill(pid, signal.SIGTERM)
            while Path("out").read_text().count("epoch ") < seen + 3 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert workers_of(process.pid) == before
        finally:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 10
    while alive(before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(before)


def workers_of(pid: int) -> list[int]:
    """Processes of this one's session whose command is a worker's: its own children, or the fork server's, that are no helpers."""
    parents = {int(path.name): path for path in Path("/proc").glob("[0-9]*")}
    children: dict[int, list[int]] = {}
    for number, path in parents.items():
        try:
            parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, ValueError):
            continue
        children.setdefault(parent, []).append(number)
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            queue.append(child)
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            helper = "resource_tracker" in command or ("forkserver" in command and child in children)
            if not helper:
                found.append(child)
    return sorted(found)
