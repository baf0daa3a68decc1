"""A network for the tests of the evaluation, and processes that run train.py or eval.py."""

import copy
import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data import load_dataset


class InFloat64(nn.Module):
    """A network whose rounding does not depend on the batch, so that figures can be compared to the bit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.double())
        return logits.float()


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """A small smooth network of digits, neither robust nor broken everywhere; its weights are frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Softplus(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
        x, y = load_dataset("digits", "").train.pixels()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for _ in range(15):
            for chosen in torch.randperm(len(x)).split(64):
                noisy = (x[chosen] + 0.3 * torch.randn_like(x[chosen])).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(noisy), y[chosen]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def network(trained: nn.Module) -> nn.Module:
    """The same in float64."""
    return InFloat64(copy.deepcopy(trained)).eval()


# Processes are forked from one that has imported what takes seconds: PyTorch, and its compiler, which an optimizer asks for.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "eval", "torch._dynamo", "sklearn.datasets"])
BEGIN = """
import importlib, os, sys
sys.argv = [script + ".py", *flags]
main = importlib.import_module(script).main
os.environ.update(environment)
os.chdir(place)
for stream, path in ((sys.stdout, out), (sys.stderr, out + ".err")):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
main(flags)
"""


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ForkServerProcess]]:
    """launch(*flags, script=, out=, environment=): a real run of train.py here, quick to start; out and out.err get what it says."""
    folder, started = tmp_path_factory.mktemp("launch"), []
    begin = folder / "begin.py"
    begin.write_text(BEGIN)

    def start(
        *flags: str, script: str = "train", out: str = "", environment: dict[str, str] | None = None
    ) -> ForkServerProcess:
        names = {
            "script": script,
            "flags": flags,
            "out": out or str(folder / "out"),
            "place": str(Path.cwd()),
            "environment": environment or {},
        }
        process = SERVER.Process(target=runpy.run_path, args=(str(begin), names))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """cut_off(steps, *flags): train.py, ended by an error of the system after so many optimizer steps."""
    import train

    def run(steps: int, *flags: str) -> None:
        done, optimizer_step = [], train.optimizer_step

        def step(*args: object) -> None:
            if len(done) == steps:
                raise ConnectionResetError
            done.append(1)
            optimizer_step(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(train, "optimizer_step", step)
            with pytest.raises(SystemExit):
                train.main(flags)
        assert len(done) == steps

    return run


@pytest.fixture(scope="session")
def hostile_json() -> list[str]:
    """Texts that no program of ours wrote as a file of JSON: cut off, nested deep, with huge numbers, of another type."""
    nested = [front * depth + middle + back * depth for front, middle, back in (("[", "", "]"), ('{"run":', "1", "}"))
              for depth in (500, 900, 10**5)]  # fmt: skip
    deep = [f'{{"run": {text}}}' for text in nested]
    huge = [f'{{"run": {"9" * digits}}}' for digits in (400, 5000)]
    return ["", "{", "[" * 10**5, '{"a":' * 10**5, *nested, *deep, *huge, "[]", "3", "null", '"text"', "\0", "nan"]
