"""Several processes train what one does, and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from utils.checkpoint import newest_state
from utils.cli import UsageError
from utils.distributed import SyncBatchNorm, process_group, sync_batchnorm

Launch = Callable[..., ForkServerProcess]
FLAGS = ["--dataset=digits", "--device=cpu", "--threads=1", "--attack=apgd", "--l_norms=Linf L1", "--at_iter=3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def started(launch: Launch, number: int, *flags: str) -> list[ForkServerProcess]:
    """So many processes of a run, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        launch(
            *(*FLAGS, *flags, "--save_dir=together"),
            out=f"out{rank}",
            environment=address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(number)
    ]


def together(launch: Launch, number: int, *flags: str) -> Path:
    """The folder of a run of so many processes."""
    for rank, process in enumerate(started(launch, number, *flags)):
        process.join()
        assert process.exitcode == 0, Path(f"out{rank}.err").read_text()
    return max(Path("together").iterdir(), key=lambda path: path.stat().st_mtime)


def records(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def furthest(one: Path, other: Path) -> float:
    """Largest difference of two checkpoints' weights and buffers."""
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


NET = """
import sys, torch
sys.path.insert(0, {root!r})
from models import build_model


class InFloat64(torch.nn.Module):
    # So that rounding does not decide a sign of the attack's steps, after which weights part.
    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, x):
        return self.model(x.double())


def deep():
    torch.manual_seed(0)
    return InFloat64(build_model("preact-resnet18", in_channels=1, width=8))


def flat():
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Softplus(), torch.nn.Linear(32, 10)
    return InFloat64(torch.nn.Sequential(*layers))
"""


def network(function: str) -> list[str]:
    """Flags to train a network in float64: a PreAct ResNet-18 or a flat one without BatchNorm."""
    Path("net.py").write_text(NET.format(root=str(Path(train.__file__).parent)))
    return ["--finetune_model", f"--model_name=net.py:{function}", "--lr-max=0.05"]


@pytest.mark.parametrize(("number", "scheme"), [(2, "eat"), (3, "eat-mixed")])
def test_the_updates_of_several_processes_are_those_of_one(number: int, scheme: str, launch: Launch) -> None:
    """Of 32, 32 and 22 points, which three can't share evenly; norms are drawn by the errors on all points."""
    flags = [
        *network("deep"),
        f"--multinorm={scheme}",
        "--n_ex_train=86",
        "--batch_size=32",
        "--epochs=1",
        "--grad_clip=3",
        "--ema=0.5",
    ]
    several, one = together(launch, number, *flags, "--sync_bn"), train.main([*FLAGS, *flags])
    for name in ("ep_1.pth", "ep_1_ema.pth"):
        assert furthest(several / name, one / name) < 1e-5
    assert furthest(one / "ep_1.pth", one / "ep_1_ema.pth") > 1e-3  # they did move
    [theirs], [ours] = records(several), records(one)
    for norm in ("Linf", "L1"):
        for key in ("drawn", "error", "running_error"):
            assert theirs["norms"][norm][key] == ours["norms"][norm][key]
    assert json.loads((several / "env.json").read_text())["processes"] == number


@pytest.mark.parametrize("more", [[], ["--awp=0.01", "--eps_warmup=0.5"]])
def test_pieces_add_up_to_the_batch(more: list[str], launch: Launch) -> None:
    """For a network whose statistics don't depend on the batch, in one process and in two."""
    flags = [*network("flat"), "--n_ex_train=100", "--batch_size=48", "--epochs=2", *more]
    one = train.main([*FLAGS, *flags])
    assert furthest(train.main([*FLAGS, *flags, "--accumulate=5"]) / "ep_2.pth", one / "ep_2.pth") < 1e-5
    assert furthest(together(launch, 2, *flags, "--accumulate=3") / "ep_2.pth", one / "ep_2.pth") < 1e-5


def test_all_processes_have_the_same_network_and_share_its_evaluation(launch: Launch) -> None:
    """Statistics of their own points made one: the figures that each finds on its part are those of the checkpoint."""
    flags = ["--width=8", "--n_ex_train=400", "--batch_size=32", "--epochs=2", "--eval_freq=2", "--n_ex_eval=40"]
    folder = together(launch, 2, *flags, "--final_eval", "--n_ex_final=6")
    result = eval_script.main([f"--model_name={folder}/ep_2.pth", "--attacks=quick", "--n_ex=40", "--device=cpu"])
    found = json.loads((result / "eval.json").read_text())["accuracy"]
    assert found["clean"]["accuracy"] > 20
    assert records(folder)[1]["eval"]["test"] == found
    assert json.loads((folder / "eval.json").read_text())["accuracy"]["union"]["points"] == 6
    assert not (folder / "eval").exists()


def torchrun(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    return subprocess.Popen([*command, *FLAGS, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(pattern: str) -> Path:
    deadline = time.monotonic() + 90
    while not (found := list(Path().glob(pattern))):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.01)
    return found[0]


LONG = ["--width=8", "--n_ex_train=200", "--batch_size=32", "--epochs=4", "--save_freq=1", "--save_every=0.00001"]


def test_a_process_that_is_asked_to_stop_stops_all_and_the_run_is_resumed(launch: Launch) -> None:
    """SIGTERM to one of two; whoever resumes was not asked to stop."""
    whole = together(launch, 2, *LONG)
    processes = started(launch, 2, *LONG, "--notes_run=cut")
    wait_for("together/*cut/state_0001_*")
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [143, 143]
    assert "SIGTERM: the state after batch" in Path("out0").read_text()
    folder = together(launch, 2, *LONG, "--notes_run=cut", "--resume")
    assert folder.name.endswith("cut")
    assert furthest(folder / "ep_4.pth", whole / "ep_4.pth") == 0


@pytest.mark.slow
def test_torchrun_that_loses_a_process_ends_and_can_be_resumed(launch: Launch) -> None:
    """Once by kill -9 of one process, once by SIGTERM to all."""
    whole = together(launch, 2, *LONG)
    run = torchrun(*LONG, "--resume")
    wait_for("runs/*/state_0001_*")
    first, second = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    start = time.monotonic()
    error = run.communicate(timeout=60)[1]
    assert time.monotonic() - start < 60
    assert run.returncode != 0
    [folder] = Path("runs").iterdir()
    assert f"train.py --resume={folder}" in error
    assert newest_state(folder)[0] is not None
    assert not Path(f"/proc/{first}").exists()

    run = torchrun(*LONG, "--resume")
    wait_for("runs/*/state_0002_*")
    run.terminate()
    said, error = run.communicate(timeout=60)
    assert "SIGTERM: the state after batch" in said, error
    assert f"resume with: torchrun ... train.py --resume={folder}" in said

    run = torchrun(f"--resume={folder}")
    said, error = run.communicate(timeout=60)
    assert "saved" in said
    assert run.returncode == 0, error
    assert furthest(folder / "ep_4.pth", whole / "ep_4.pth") == 0
    assert [record["loss"] for record in records(folder)] == [record["loss"] for record in records(whole)]


def test_batches_that_cannot_be_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([*FLAGS, "--batch_size=8", "--accumulate=5"])
    assert "--batch_size" in capsys.readouterr().err


def test_shared_statistics_change_nothing_else() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4, affine=False)
    )
    x = torch.randn(5, 3, 6, 6)
    model(x)
    before, expected = model.state_dict(), model.eval()(x)
    shared = sync_batchnorm(model.train(), torch.device("cpu"))
    assert sum(isinstance(module, SyncBatchNorm) for module in shared.modules()) == 2
    assert shared.state_dict().keys() == before.keys()
    assert torch.equal(shared.eval()(x), expected)


@pytest.mark.parametrize(
    ("variables", "several"), [({"WORLD_SIZE": "1"}, False), ({"WORLD_SIZE": "2", "RANK": "0"}, True)]
)
def test_a_number_of_processes_without_an_address(
    variables: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One runs alone; of several, one line says what is missing."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(UsageError, match="MASTER_ADDR, MASTER_PORT; start the program with torchrun")
    with refused if several else nullcontext(), process_group(torch.device("cpu")) as process:
        assert (process.rank, process.world_size) == (0, 1)
