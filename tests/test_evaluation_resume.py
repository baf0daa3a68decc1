"""An evaluation ends with the same figures and images, however often and in whatever way it was ended before."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eval as evaluation_script
from data import load_dataset
from utils.checkpoint import load_tensors, save_with_digest

# In float64, so that rounding does not depend on the batch; states are written often; a file named `fail` makes the network fail.
NET = """
import time
from pathlib import Path
import torch
from torch import nn
import evaluation.storage
evaluation.storage.SECONDS = 0.02
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 10)).double()
        self.layers.load_state_dict(torch.load("weights.pth"))
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 60 and Path("fail").exists():
            raise RuntimeError("out of\\nthis network's memory")
        time.sleep(0.004)
        return self.layers(x.double()).float()
make = Net
"""
FLAGS = ["--model_name=net.py:make", "--dataset=digits", "--n_ex=24", "--n_iter=8", "--device=cpu", "--threads=1"]
FLAGS += ["--batch_size_eval=8"]
Launch = Callable[..., ForkServerProcess]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a network of digits, and its undisturbed evaluation in whole/."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("evaluation")
    os.chdir(folder)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 10)).double()
    x, y = load_dataset("digits", "").train.pixels()
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
    for _ in range(10):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layers(x[chosen].double()), y[chosen]).backward()
            optimizer.step()
    torch.save(layers.state_dict(), "weights.pth")
    Path("net.py").write_text(NET)
    evaluation_script.main([*FLAGS, "--save_dir=whole"])
    yield folder
    os.chdir(before)


@pytest.fixture
def done(place: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed evaluation's folder; its parent is for --save_dir."""
    return shutil.copytree(the_folder(Path("whole")), tmp_path / the_folder(Path("whole")).name)


def start(launch: Launch, number: int, *flags: str) -> list[ForkServerProcess]:
    """An evaluation in so many processes; what rank 0 says goes to out and out.err."""
    if number == 1:
        return [launch(*FLAGS, *flags, script="eval", out="out")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [launch(*FLAGS, *flags, script="eval", out=f"out{i or ''}", environment=ranks[i]) for i in range(number)]


def finished(launch: Launch, number: int, *flags: str, code: int = 0) -> tuple[str, str]:
    """What an evaluation says on stdout and stderr, after its end."""
    processes = start(launch, number, *flags)
    for process in processes:
        process.join()
    said, error = Path("out").read_text(), Path("out.err").read_text()
    assert [process.exitcode for process in processes] == [code] * number, error
    return said, error


def here(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> tuple[str, str]:
    """The same in this process."""
    ended = 0
    try:
        evaluation_script.main([*FLAGS, *flags])
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else 1
    said = capsys.readouterr()
    assert ended == code, said.err
    return said.out, said.err


def the_folder(place: Path) -> Path:
    [folder] = place.iterdir()
    return folder


def found(folder: Path) -> dict[str, Any]:
    """Figures and images."""
    content = json.loads((folder / "eval.json").read_text())
    for about in content["norms"].values():
        about["counts"].pop("images_attacked_again")
    images = {path.name: path.read_bytes() for path in folder.glob("adv_*.npy")}
    return {name: content[name] for name in ("accuracy", "outcomes", "norms", "warnings")} | images


KILLS = [(1, 3), (2, 3), *(pytest.param(number, 20, marks=pytest.mark.slow) for number in (1, 2))]


@pytest.mark.parametrize(("number", "kills"), KILLS)
def test_killed_at_any_moment_it_ends_with_the_same_figures_and_images(
    number: int, kills: int, place: Path, tmp_path: Path, launch: Launch
) -> None:
    draws, killed, runs = random.Random(number), 0, 1
    while killed < kills:
        save_dir = tmp_path / f"cut{runs}"
        processes = start(launch, number, f"--save_dir={save_dir}", "--resume")
        before = states(save_dir)
        while all(process.is_alive() for process in processes) and states(save_dir) == before:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.3))
        for process in draws.sample(processes, number):
            process.kill()
            process.join()
        ends = [process.exitcode for process in processes]
        killed += -signal.SIGKILL in ends
        assert set(ends) <= {0, -signal.SIGKILL}
        if ends == [0] * number:
            runs += 1
    finished(launch, number, f"--save_dir={save_dir}", "--resume")
    for run in range(1, runs + 1):
        assert found(the_folder(tmp_path / f"cut{run}")) == found(the_folder(Path("whole")))


def states(save_dir: Path) -> set[str]:
    return {path.name for path in save_dir.glob("*/progress_*.pth")}


def stop(launch: Launch, number: int, save_dir: Path, *flags: str) -> None:
    """Kill an evaluation after some of its states."""
    processes = start(launch, number, f"--save_dir={save_dir}", *flags)
    deadline = time.monotonic() + 60
    while max([int(name.split("_")[2][:8]) for name in states(save_dir)], default=0) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_processes_goes_on(
    first: int, then: int, place: Path, tmp_path: Path, launch: Launch
) -> None:
    stop(launch, first, tmp_path)
    passes = sum(int(log["passes"].sum()) for log in attacked(the_folder(tmp_path)))
    assert passes > 0
    finished(launch, then, f"--save_dir={tmp_path}", "--resume")
    assert found(the_folder(tmp_path)) == found(the_folder(Path("whole")))
    assert {path.name.split("_")[1] for path in the_folder(tmp_path).glob("progress_*")} == set(map(str, range(then)))


def attacked(folder: Path) -> list[dict[str, Any]]:
    newest = {path.name.split("_")[1]: path for path in sorted(folder.glob("progress_*.pth"))}
    return [log for path in newest.values() for log in load_tensors(path)["logs"].values()]


def test_nothing_is_attacked_twice(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = attacked(done)
    here(capsys, f"--save_dir={done.parent}", "--resume")
    for old, new in zip(before, attacked(done), strict=True):
        assert torch.equal(old["passes"], new["passes"])
        assert old["counts"]["images_verified"] == int((new["broken_by"] >= 0).sum()) > 0
    assert found(done) == found(the_folder(Path("whole")))


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"'<f4'", b"'>f4'"))


def clean_images(path: Path) -> None:
    shutil.copy(sorted(path.parent.glob("adv_*"))[0], path)  # allowed in no other ball, or do not break the network


def zeros(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:128] + bytes(len(data) - 128))


def no_numbers(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:128] + b"\xff" * (len(data) - 128))


@pytest.mark.parametrize("damage", [cut_file, other_header, zeros, no_numbers, clean_images, Path.unlink])
def test_images_that_are_damaged_are_attacked_again(
    damage: Callable[[Path], None], done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = done / "adv_Linf_0.1.npy"
    damage(path)
    here(capsys, f"--save_dir={done.parent}", "--resume")
    counts = json.loads((done / "eval.json").read_text())["norms"]["Linf"]["counts"]
    assert counts["images_attacked_again"] == counts["images_verified"] > 0
    assert found(done) == found(the_folder(Path("whole")))


def test_an_image_that_never_comes_back_whole_is_not_counted(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that forgets what is written to it."""
    from evaluation.images import ImageFile

    def forgetful(self: ImageFile, index: list[int], images: torch.Tensor) -> None:
        pass

    (done / "adv_Linf_0.1.npy").unlink()
    monkeypatch.setattr(ImageFile, "write", forgetful)
    said = here(capsys, f"--save_dir={done.parent}", "--resume")[0]
    content = json.loads((done / "eval.json").read_text())
    assert content["accuracy"]["Linf"]["accuracy"] == content["accuracy"]["clean"]["accuracy"]
    assert content["norms"]["Linf"]["counts"]["images_verified"] == 0
    assert "WARNING: Linf 0.1:" in said
    assert "they count as not broken" in said


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, cut_file, Path.unlink])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_damaged_state_is_noticed(
    damage: Callable[[Path], None], all_of_them: bool, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(done.glob("progress_*.pth"))
    assert len(paths) == 2
    for path in paths if all_of_them else paths[-1:]:
        damage(path)
    said = here(capsys, f"--save_dir={done.parent}", "--resume")[0]
    assert (f"{paths[-1]} is damaged, it is not used" in said) == (damage is not Path.unlink)
    assert ("no undamaged state: all is attacked again" in said) == all_of_them
    assert found(done) == found(the_folder(Path("whole")))


def refused(capsys: pytest.CaptureFixture[str], done: Path, *flags: str) -> str:
    before = {path: path.read_bytes() for path in done.parent.rglob("*") if path.is_file()}
    error = here(capsys, f"--save_dir={done.parent}", "--resume", *flags, code=2)[1]
    assert {path: path.read_bytes() for path in done.parent.rglob("*") if path.is_file()} == before
    assert "argument --resume" in error
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "flag", ["--seed=1", "--l_eps=0.1 0.4 1", "--attacks=fast", "--curve", "--curve=L2:0.2", "--n_iter=9"]
)
def test_another_settings_state_is_refused(flag: str, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag.partition("=")[0].removeprefix("--") in refused(capsys, done, flag)


def test_another_networks_state_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load("weights.pth")
    try:
        torch.save(weights | {"3.bias": weights["3.bias"] + 1e-3}, "weights.pth")
        assert "network differ" in refused(capsys, done)
    finally:
        torch.save(weights, "weights.pth")


def changed(done: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Put a changed state, with a right digest, in the newest one's place."""
    path = sorted(done.glob("progress_*.pth"))[-1]
    content = load_tensors(path)
    save_with_digest(change(content), done / "progress_0_00099999")


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other images": (lambda c: c | {"identity": c["identity"] | {"images": [16, "0"]}}, "images differ"),
    "other runs": (lambda c: c | {"identity": c["identity"] | {"runs": c["identity"]["runs"][1:]}}, "runs differ"),
    "a number": (lambda c: 3, "no state of an evaluation"),
    "a training state": (lambda c: {"state_dict": {}, "epoch": 1}, "no state of an evaluation"),
    "no logs": (lambda c: {"identity": c["identity"]}, "no state of an evaluation"),
    "logs of another type": (lambda c: c | {"logs": dict.fromkeys(c["logs"], 3)}, "no state of an evaluation"),
    "fewer examples": (
        lambda c: c | {"logs": {key: log | {"passes": log["passes"][1:]} for key, log in c["logs"].items()}},
        "no state of an evaluation",
    ),
    "a run that is not": (
        lambda c: c | {"logs": {key: log | {"broken_by": log["broken_by"] + 99} for key, log in c["logs"].items()}},
        "no state of an evaluation",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused(name: str, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = FOREIGN[name]
    changed(done, change)
    assert words in refused(capsys, done)


def test_an_evaluation_of_an_earlier_version_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "progress-0.jsonl").write_text('{"task": "clean", "point": 0, "right": true}\n')
    assert "earlier version" in refused(capsys, done)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("full", 1), ("fail", 1)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_an_end_is_one_line_that_says_how_to_go_on(
    number: signal.Signals | str, code: int, processes: int, place: Path, tmp_path: Path, launch: Launch
) -> None:
    fail = Path("fail")
    if number == "fail":
        fail.touch()
    started = start(launch, processes, f"--save_dir={tmp_path}")
    try:
        deadline = time.monotonic() + 60
        while len(states(tmp_path)) < 2 and number != "fail":
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for process in started:
            if number == "full":
                resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            elif isinstance(number, signal.Signals):
                os.kill(process.pid or 0, number)
        for process in started:
            process.join()
    finally:
        fail.unlink(missing_ok=True)
    error = Path("out.err").read_text()
    assert [process.exitcode for process in started] == [code] * processes, error
    [line] = [line for line in error.splitlines() if line.startswith("eval.py: ")]
    assert "Traceback" not in error
    assert f"is kept in {the_folder(tmp_path)}" in line
    assert line.endswith(" --resume")
    finished(launch, processes, f"--save_dir={tmp_path}", "--resume")
    assert found(the_folder(tmp_path)) == found(the_folder(Path("whole")))


def test_a_disk_too_full_for_the_images_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    error = here(capsys, f"--save_dir={tmp_path}", code=1)[1]
    assert "No space left on device" in error
    assert error.count("\n") == 1
    monkeypatch.delattr(os, "posix_fallocate")  # as on systems that have none
    here(capsys, f"--save_dir={tmp_path}", "--resume")
    assert found(the_folder(tmp_path)) == found(the_folder(Path("whole")))
