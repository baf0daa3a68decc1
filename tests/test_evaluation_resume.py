"""An evaluation that is killed goes on to the same figures, and several processes find what one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FLAGS = ["--model_name=net.pth", "--n_ex=24", "--n_iter=20", "--device=cpu", "--batch_size_eval=4"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network of digits, and its undisturbed evaluation in whole/."""
    from data import load_dataset
    from models import build_model

    folder = tmp_path_factory.mktemp("evaluation")
    spec = {"arch": "preact-resnet18", "num_classes": 10, "in_channels": 1, "width": 8, "act": "softplus1"}
    torch.manual_seed(0)
    model = build_model(**spec)
    x, y = load_dataset("digits", "").train.pixels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    torch.save({"spec": spec, "state_dict": model.state_dict(), "epoch": 1, "dataset": "digits"}, folder / "net.pth")
    start(folder, "--save_dir=whole").communicate()
    return folder


def start(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "eval.py"), *FLAGS, *flags]
    return subprocess.Popen(
        command, cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def figures(folder: Path) -> tuple[object, object, object]:
    [path] = folder.glob("*/eval.json")
    content = json.loads(path.read_text())
    return content["accuracy"], content["outcomes"], content["norms"]


def lines(folder: Path) -> list[str]:
    paths = list(folder.glob("*/progress-0.jsonl"))
    return paths[0].read_text().splitlines() if paths else []


def test_killed_at_several_moments_it_ends_with_the_same_figures(place: Path) -> None:
    total = len(lines(place / "whole"))
    killed = 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        run = start(place, "--save_dir=cut", "--resume")
        while run.poll() is None and len(lines(place / "cut")) < share * total:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        killed += run.returncode == -signal.SIGKILL
    assert killed >= 3
    [journal] = (place / "cut").glob("*/progress-0.jsonl")
    with journal.open("a") as file:
        file.write('{"task": "L1 2", "poi')  # as a write that was cut off
    run = start(place, "--save_dir=cut", "--resume")
    output, error = run.communicate()
    assert run.returncode == 0, error
    assert "union" in output
    assert figures(place / "cut") == figures(place / "whole")
    records = [json.loads(line) for line in lines(place / "cut") if line.endswith("}")]
    done = [(record["task"], record["point"], record.get("run")) for record in records]
    assert len(done) == len(set(done)) == total  # nothing was attacked twice
    again = start(place, "--save_dir=cut", "--resume")
    assert "union" in again.communicate()[0]
    assert len(lines(place / "cut")) == len(records) + 1  # with the torn line: nothing was attacked again


@pytest.mark.parametrize("flag", ["--seed=1", "--l_eps=0.1 0.4 1", "--attacks=fast"])
def test_another_settings_state_is_refused(place: Path, flag: str) -> None:
    before = sorted((place / "whole").rglob("*"))
    run = start(place, "--save_dir=whole", "--resume", flag)
    error = run.communicate()[1]
    assert run.returncode == 2
    assert "--resume" in error
    assert flag.partition("=")[0].removeprefix("--") in error
    assert error.count("\n") == 1
    assert sorted((place / "whole").rglob("*")) == before


def test_a_state_with_other_runs_is_refused(place: Path) -> None:
    shutil.copytree(place / "whole", place / "old")
    [asked] = (place / "old").glob("*/asked.json")
    content = json.loads(asked.read_text())
    asked.write_text(json.dumps(content | {"runs": content["runs"][1:]}))  # as before the brief run of L1 was there
    run = start(place, "--save_dir=old", "--resume")
    assert "another runs" in run.communicate()[1]
    assert run.returncode == 2


def test_two_processes_find_what_one_does(place: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = start(place, "--save_dir=two", launcher=launcher)
    error = run.communicate()[1]
    assert run.returncode == 0, error
    assert figures(place / "two") == figures(place / "whole")
    [folder] = (place / "two").iterdir()
    assert all((folder / f"progress-{rank}.jsonl").stat().st_size > 0 for rank in (0, 1))
