"""An evaluation that is killed goes on to the same figures, and several processes find what one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from data import load_dataset
from models import build_model

FLAGS = ["--model_name=net.pth", "--n_ex=24", "--n_iter=8", "--device=cpu", "--threads=1", "--batch_size_eval=4"]
Launch = Callable[..., ForkServerProcess]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Iterator[Path]:
    """The working folder, with a network of digits, and its undisturbed evaluation in whole/."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("evaluation")
    os.chdir(folder)
    spec = {"arch": "preact-resnet18", "num_classes": 10, "in_channels": 1, "width": 4, "act": "softplus1"}
    torch.manual_seed(0)
    model = build_model(**spec)
    x, y = load_dataset("digits", "").train.pixels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    torch.save({"spec": spec, "state_dict": model.state_dict(), "epoch": 1, "dataset": "digits"}, "net.pth")
    finished(launch, "--save_dir=whole")
    yield folder
    os.chdir(before)


def finished(launch: Launch, *flags: str, code: int = 0, **how: object) -> tuple[str, str]:
    """What an evaluation says on stdout and stderr, after its end."""
    process = launch(*FLAGS, *flags, script="eval", out="out", **how)
    process.join()
    said, error = Path("out").read_text(), Path("out.err").read_text()
    assert process.exitcode == code, error
    return said, error


def figures(folder: Path) -> tuple[object, object, object]:
    [path] = folder.glob("*/eval.json")
    content = json.loads(path.read_text())
    return content["accuracy"], content["outcomes"], content["norms"]


def lines(folder: Path) -> list[str]:
    paths = list(folder.glob("*/progress-0.jsonl"))
    return paths[0].read_text().splitlines() if paths else []


def test_killed_at_several_moments_it_ends_with_the_same_figures(place: Path, launch: Launch) -> None:
    total = len(lines(place / "whole"))
    killed = 0
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        process = launch(*FLAGS, "--save_dir=cut", "--resume", script="eval")
        while process.is_alive() and len(lines(place / "cut")) < part * total:
            time.sleep(0.005)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    [journal] = (place / "cut").glob("*/progress-0.jsonl")
    with journal.open("a") as file:
        file.write('{"task": "L1 2", "poi')  # as a write that was cut off
    assert "union" in finished(launch, "--save_dir=cut", "--resume")[0]
    assert figures(place / "cut") == figures(place / "whole")
    records = [json.loads(line) for line in lines(place / "cut") if line.endswith("}")]
    done = [(record["task"], record["point"], record.get("run")) for record in records]
    assert len(done) == len(set(done)) == total  # nothing was attacked twice
    assert "union" in finished(launch, "--save_dir=cut", "--resume")[0]
    assert len(lines(place / "cut")) == len(records) + 1  # with the torn line: nothing was attacked again


@pytest.mark.parametrize("flag", ["--seed=1", "--l_eps=0.1 0.4 1", "--attacks=fast"])
def test_another_settings_state_is_refused(place: Path, flag: str, launch: Launch) -> None:
    before = sorted((place / "whole").rglob("*"))
    error = finished(launch, "--save_dir=whole", "--resume", flag, code=2)[1]
    assert "--resume" in error
    assert flag.partition("=")[0].removeprefix("--") in error
    assert error.count("\n") == 1
    assert sorted((place / "whole").rglob("*")) == before


def test_a_state_with_other_runs_is_refused(place: Path, launch: Launch) -> None:
    shutil.copytree(place / "whole", place / "old")
    [asked] = (place / "old").glob("*/asked.json")
    content = json.loads(asked.read_text())
    asked.write_text(json.dumps(content | {"runs": content["runs"][1:]}))  # as before the brief run of L1 was there
    assert "another runs" in finished(launch, "--save_dir=old", "--resume", code=2)[1]


def test_two_processes_find_what_one_does(place: Path, launch: Launch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    second = launch(*FLAGS, "--save_dir=two", script="eval", environment=address | {"RANK": "1", "LOCAL_RANK": "1"})
    finished(launch, "--save_dir=two", environment=address | {"RANK": "0", "LOCAL_RANK": "0"})
    second.join()
    assert second.exitcode == 0
    assert figures(place / "two") == figures(place / "whole")
    [folder] = (place / "two").iterdir()
    assert all((folder / f"progress-{rank}.jsonl").stat().st_size > 0 for rank in (0, 1))
