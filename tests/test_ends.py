"""File systems that lack something, processes that die early, and devices that are not there: a note or one line, and no endless wait."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from utils import text
from utils.checkpoint import save_atomic
from utils.distributed import local_device
from utils.resume import lock_run

ROOT = Path(train.__file__).parent
FLAGS = ["--dataset=digits", "--device=cpu", "--width=4", "--n_ex_train=64", "--epochs=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "_NOTED", set())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("what", ["folders", "files"])
def test_a_file_system_without_sync_works_with_a_note(
    what: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if what == "files" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = train.main(FLAGS)
    name = f"--model_name={folder}/ep_1.pth"
    assert eval_script.main([name, "--n_ex=20", "--attacks=fast", "--n_iter=4", "--l_norms=Linf", "--device=cpu"])
    assert capsys.readouterr().out.count("note: this file system cannot say when files are on its disk") == 1


def test_another_error_of_sync_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        save_atomic({}, Path("x.pth"))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_works_with_a_note(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train.main(FLAGS)
    assert "note: this file system has no locks" in capsys.readouterr().out


def test_an_error_of_locks_that_is_none_of_the_file_system_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with ExitStack(), pytest.raises(OSError, match="Input/output"):
        lock_run(Path(), 0)


def environment(rank: int, number: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    return os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("there", [0, 1])
def test_a_process_that_never_starts_ends_the_other(there: int) -> None:
    """The two minutes are made five seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = (
        f"import sys\nfrom datetime import timedelta\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import train\nfrom utils import distributed\ndistributed.STARTING = timedelta(seconds=5)\ntrain.main({FLAGS!r})\n"
    )
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment(there, 2, port), capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 2, run.stderr
    assert "not all of the 2 processes started within 5 s" in run.stderr.splitlines()[-1]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("device", "environment", "visible", "expected"),
    [
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, "cuda:1"),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, "cuda:0"),
        (
            "cuda",
            {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
            2,
            "process 3 of this machine has no GPU, 2 are visible",
        ),
        ("cuda:0", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, "cuda:0 for all of torchrun's processes"),
        ("cuda:1", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 2, "cuda:1"),
        ("cuda", {}, 2, "cuda"),
        ("cpu", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 0, "cpu"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    device: str, environment: dict[str, str], visible: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            local_device(torch.device(device))
    else:
        assert str(local_device(torch.device(device))) == expected
