"""A run that is killed, stopped or cut off, by whatever means, goes on to the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import train
import utils.resume
from attacks.multinorm import SCHEMES
from utils.checkpoint import load_tensors, newest_state, state_files
from utils.run_folder import flat

FLAGS = [
    *(
        "--dataset=digits",
        "--width=8",
        "--n_ex_train=110",
        "--batch_size=16",
        "--epochs=5",
        "--device=cpu",
        "--threads=1",
    ),
    *("--attack=apgd", "--l_norms=Linf L1", "--at_iter=3", "--ema=0.9", "--accumulate=2"),
    *("--eval_freq=4", "--n_ex_eval=4", "--eval_eps=0.3 1.2 6", "--save_freq=2", "--save_every=0.00001"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Launch = Callable[..., ForkServerProcess]


def finish(launch: Launch, *flags: str) -> int | None:
    process = launch(*FLAGS, *flags)
    process.join()
    return process.exitcode


def refused(*flags: str) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(flags)
    assert end.value.code == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """The folder of an undisturbed run."""
    place = tmp_path_factory.mktemp("whole")
    assert finish(launch, f"--save_dir={place}") == 0
    return the_run(place)


def the_run(place: Path) -> Path:
    [folder] = place.iterdir()
    return folder


def outcome(folder: Path) -> list[Any]:
    """All that a run leaves, but for times: metrics, and the bytes of all weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    files = sorted(folder.glob("*.pth"))
    found = []
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        found.append((file.name, [(name, value.numpy().tobytes()) for name, value in state.items()]))
    return [records, found]


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_weights(kills: int, whole: Path, launch: Launch) -> None:
    """Half of them random, the others while a file is being written. On a slow machine that takes more than one run."""
    draws, killed, torn, runs = random.Random(0), 0, 0, 1
    while killed < kills:
        place = f"cut{runs}"
        process = launch(*FLAGS, f"--save_dir={place}", "--resume")
        if killed % 2:
            while process.is_alive() and not list(Path(place).glob("*/state_*.part")):
                time.sleep(0.0002)
        else:
            before = states(place)[-1:]
            while process.is_alive() and states(place)[-1:] == before:
                time.sleep(0.001)
            time.sleep(draws.uniform(0, 0.25))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        torn += bool(list(Path(place).glob("*/state_*.part")))
        if process.exitcode == 0:
            runs += 1
    assert torn >= kills // 6
    assert finish(launch, f"--save_dir={place}", "--resume") == 0
    for number in range(1, runs + 1):
        folder = the_run(Path(f"cut{number}"))
        assert outcome(folder) == outcome(whole)
        assert not list(folder.glob("state_*")), "a complete run needs no state"


def states(place: str) -> list[str]:
    return sorted(path.name for path in Path(place).glob("*/state_*.pth"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(whole: Path, launch: Launch, number: int, code: int) -> None:
    process = launch(*FLAGS, "--save_dir=cut", "--save_every=1000", out="out")
    wait_for("cut", "metrics.jsonl")
    time.sleep(0.1)
    for _ in range(2):
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    said = Path("out").read_text()
    folder = the_run(Path("cut"))
    assert f"{signal.Signals(number).name}: the state after batch" in said
    assert f"resume with: python train.py --resume={folder}" in said
    train.main([f"--resume={folder}"])  # its flags are known
    assert outcome(folder) == outcome(whole)
    assert len(json.loads((folder / "env.json").read_text())["resumed"]) == 1


def wait_for(place: str | Path, pattern: str) -> None:
    """Until the run in that folder has such a file."""
    deadline = time.monotonic() + 60
    while not list(Path(place).glob(f"*/{pattern}")):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.005)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """The folder of a run that was stopped in the middle, with two states."""
    place = tmp_path_factory.mktemp("half")
    process = launch(*FLAGS, f"--save_dir={place}")
    wait_for(place, "ep_2.pth")
    wait_for(place, "state_0002_000002-*.pth")
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert len(state_files(the_run(place))) == 2
    return the_run(place)


@pytest.fixture
def half(stopped: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped, Path("half") / stopped.name)


def test_a_damaged_state_is_noticed_and_the_one_before_is_used(
    half: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = state_files(half)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    train.main([f"--resume={half}"])
    assert f"{newest} is damaged, it is not used" in capsys.readouterr().out
    assert outcome(half) == outcome(whole)


def test_with_no_state_whole_it_does_not_begin_anew(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in state_files(half):
        path.write_bytes(path.read_bytes()[:-100])
    before = sorted(half.iterdir())
    refused(f"--resume={half}")
    assert "no state" in capsys.readouterr().err
    assert sorted(half.iterdir()) == before


def test_any_damage_to_a_state_is_noticed(half: Path, tmp_path: Path) -> None:
    """A bit changed, or the end cut off, anywhere."""
    path = state_files(half)[-1]
    data, folder = path.read_bytes(), tmp_path / "damaged"
    folder.mkdir()
    draws = random.Random(0)
    for place in [*(draws.randrange(len(data)) for _ in range(100)), *range(100), *range(len(data) - 100, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 1 << draws.randrange(8)
        for content in (changed, data[:place]):
            (folder / path.name).write_bytes(content)
            with pytest.raises(ValueError, match="no state"):
                newest_state(folder)
    (folder / path.name).write_bytes(data)
    assert newest_state(folder) == (folder / path.name, [])


def test_a_full_disk_ends_the_run_with_its_last_state_whole(whole: Path, launch: Launch) -> None:
    process = launch(*FLAGS, "--save_dir=full", out="out")
    wait_for("full", "state_0000_000003-*.pth")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    process.join()
    error = Path("out.err").read_text().splitlines()[-1]
    assert process.exitcode == 1
    folder = the_run(Path("full"))
    path, damaged = newest_state(folder)
    assert "File too large" in error
    assert f"the last good state is {path}" in error
    assert f"--resume={folder}" in error
    assert not damaged
    assert not list(folder.glob("*.part"))
    train.main([f"--resume={folder}"])
    assert outcome(folder) == outcome(whole)


def test_a_live_run_is_left_alone(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(utils.resume, "WAIT", 0.1)
    process = launch(*FLAGS, "--save_dir=live", "--epochs=1000")
    try:
        wait_for("live", "state_0000_000002-*.pth")
        folder = the_run(Path("live"))
        refused(f"--resume={folder}")
        assert f"{folder} belongs to a process that still runs" in capsys.readouterr().err
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_two_runs_that_start_together_do_not_meet(whole: Path, launch: Launch) -> None:
    processes = [launch(*FLAGS, "--save_dir=pair") for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    folders = sorted(Path("pair").iterdir())
    assert len(folders) == 2
    assert all(outcome(folder) == outcome(whole) for folder in folders)


def test_a_final_evaluation_goes_on_where_it_was_killed(half: Path, launch: Launch) -> None:
    """Asked for when the run goes on, which is allowed."""
    flags = ["--final_eval", "--n_ex_final=20", "--batch_size_eval=8"]
    other = shutil.copytree(half, Path("undisturbed") / half.name)
    train.main([f"--resume={other}", *flags])
    process = launch(f"--resume={half}", *flags)
    deadline = time.monotonic() + 60
    while not made(half):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not (half / "eval_ema.json").exists()
    train.main([f"--resume={half}", *flags])
    for name in ("eval.json", "eval_ema.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (half, other))
        assert (ours["accuracy"], ours["norms"]) == (theirs["accuracy"], theirs["norms"])


def made(folder: Path) -> int:
    """Passes of the final evaluation's attacks, as its newest state tells."""
    state = newest_state(folder, "progress_0")[0]
    return sum(int(log["passes"].sum()) for log in load_tensors(state)["logs"].values()) if state else 0


def test_the_state_of_another_run_is_refused(
    half: Path, hostile_json: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the same flags too; and env.json or metrics that are not JSON, or not as they should be."""
    env = json.loads((half / "env.json").read_text())
    for hostile, words in (
        (json.dumps(env | {"run": "another"}), "is a state of another run: take it out of this folder"),
        (json.dumps(env | {"resumed": 5}), "env.json"),
        *((text, "env.json") for text in hostile_json),
    ):
        (half / "env.json").write_text(hostile)
        before = state_files(half)
        refused(f"--resume={half}")
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert state_files(half) == before


def test_metrics_that_are_not_metrics_are_left_out(half: Path, whole: Path, hostile_json: list[str]) -> None:
    with (half / "metrics.jsonl").open("a") as file:
        file.writelines(f"{text}\n" for text in hostile_json)
    train.main([f"--resume={half}"])
    assert outcome(half) == outcome(whole)


def test_tensorboards_curves_are_the_metrics(launch: Launch) -> None:
    """Each epoch once, also those that two processes have written; averaged weights' figures beside."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = launch(*FLAGS, "--tensorboard", "--save_dir=board", "--save_every=1000", "--eval_freq=2")
    wait_for("board", "state_0003_000000-*.pth")
    process.kill()
    process.join()
    folder = the_run(Path("board"))
    state_files(folder)[-1].unlink()  # so that an epoch is done twice
    train.main([f"--resume={folder}"])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("lr", "norms/L1/error", "eval/test/union/accuracy", "eval_ema/test/union/accuracy"):
        expected = [(record["epoch"], flat(record).get(name)) for record in records]
        expected = [(epoch, pytest.approx(value)) for epoch, value in expected if value is not None]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
        assert len(expected) >= 3


PHASES = [*((name, ()) for name in SCHEMES), ("ramp", ("--gradient_projection",)), ("eat", ("--loss=trades",))]


@pytest.mark.parametrize(
    ("scheme", "more"), PHASES, ids=lambda value: "".join(value) if isinstance(value, tuple) else value
)
def test_every_scheme_is_resumed(scheme: str, more: tuple[str, ...], launch: Launch) -> None:
    """Killed in the second epoch; with gradient projection once in its standard half and once in its adversarial one."""
    flags = [flag for flag in FLAGS if flag.partition("=")[0] not in ("--ema", "--epochs", "--eval_freq", "--l_norms")]
    flags += [f"--multinorm={scheme}", "--epochs=2", "--n_ex_train=64", "--at_iter=2", *more]
    steps = ["000001", "000006"] if "--gradient_projection" in more else ["000002"]
    whole = launch(*flags, "--save_dir=whole")
    for step in steps:
        process = launch(*flags, f"--save_dir=cut{step}")
        wait_for(f"cut{step}", f"state_0001_{step}-*.pth")
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    whole.join()
    for step in steps:
        folder = train.main([f"--resume={the_run(Path(f'cut{step}'))}"])
        assert outcome(folder) == outcome(the_run(Path("whole")))


def test_a_complete_run_is_left_as_it_is(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(whole, tmp_path / "runs" / whole.name)
    before = outcome(copy)
    train.main([f"--resume={copy}"])
    train.main([*FLAGS, "--resume"])
    assert capsys.readouterr().out.count("is complete") == 2
    assert outcome(copy) == before


@pytest.mark.parametrize("flag", ["--seed=1", "--batch_size=20", "--l_eps=0.1 1.5", "--epochs=6", "--ema=0.8"])
def test_a_run_is_not_gone_on_with_in_another_way(half: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(f"--resume={half}", flag)
    name = flag.partition("=")[0].removeprefix("--")
    assert f"argument --resume: {half} was started with another {name}" in capsys.readouterr().err


def test_resume_alone_takes_the_newest_run_of_this_command(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = train.main([*FLAGS, "--save_dir=half", "--resume", "--seed=1", "--epochs=1"])
    assert "there is no run of this command in half yet" in capsys.readouterr().out
    assert other != half
    again = train.main([*FLAGS, "--save_dir=half", "--resume", "--eval_freq=0"])  # it may evaluate less often
    assert (again, len(list(Path("half").iterdir()))) == (half, 2)


@pytest.mark.parametrize("flag", ["model_name", "arch"])
def test_code_that_a_run_folder_names_is_not_run_unasked(
    half: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("evil.py").write_text("import pathlib\npathlib.Path('was_here').touch()\n")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(
        json.dumps(config | {flag: "evil.py:make", "finetune_model": flag == "model_name"})
    )
    refused(f"--resume={half}")
    assert "name that again" in capsys.readouterr().err
    assert not Path("was_here").exists()


def test_a_folder_that_is_none_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other").mkdir()
    for name in ("other", "nowhere"):
        refused(f"--resume={name}")
        assert f"{name} is not the folder of a run of train.py" in capsys.readouterr().err


RANDOM_NETWORKS = """
import torch
from torch import nn


class Noisy(nn.Module):  # random numbers that no module draws
    def forward(self, x):
        return x + torch.randn_like(x) * (torch.rand(()) < 0.5) if self.training else x


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), layer, nn.Linear(32, 10))


def dropout():
    return network(nn.Dropout(0.5))


def noise():
    return network(Noisy())
"""


@pytest.mark.parametrize("function", ["dropout", "noise"])
def test_a_network_that_draws_random_numbers_is_resumed_exactly(function: str, cut_off: Callable[..., None]) -> None:
    Path("net.py").write_text(RANDOM_NETWORKS)
    arch = f"--arch=net.py:{function}"
    flags = [*FLAGS, "--epochs=3", arch, "--awp=0.01", "--eval_freq=0"]
    flags.remove("--width=8")
    whole = train.main([*flags, "--save_dir=whole"])
    cut_off(10, *flags, "--save_dir=cut")
    torch.rand(7)  # whoever resumes has drawn other numbers
    cut = train.main([f"--resume={the_run(Path('cut'))}", arch])
    assert outcome(cut) == outcome(whole)
    assert outcome(train.main([*flags, "--seed=1"])) != outcome(whole)
