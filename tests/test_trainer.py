"""The trainer: batches and their own index, what a scheme's draw knows, and the state of schemes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
import training.trainer
from attacks.apgd import Model
from attacks.multinorm import SCHEMES, AdversarialBatch, Option, Scheme
from attacks.threat import Threat
from data import BatchLoader
from training.trainer import Trainer

FLAGS = ["--dataset=digits", "--width=4", "--n_ex_train=75", "--batch_size=32", "--epochs=2", "--device=cpu"]
EAT = ["--attack=apgd", "--l_norms=Linf L1", "--at_iter=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "ep_2.pth", weights_only=True)["state_dict"]


def test_a_loader_that_reads_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 32, 32 and 11: the size of each, and with it the loss' weight, is its own, not that of the step in work."""
    plain = train.main([*FLAGS, *EAT])
    sizes: list[int] = []

    epoch = BatchLoader.epoch

    def ahead(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield from list(epoch(*args))

    class ReadsAhead(Trainer):
        def batches(self) -> Iterator[training.trainer.Batch]:
            for batch in list(super().batches()):  # all of them before the first step
                sizes.append(batch.size)
                assert len(batch.x) == batch.size
                yield batch

    monkeypatch.setattr(BatchLoader, "epoch", ahead)
    monkeypatch.setattr(train, "Trainer", ReadsAhead)
    other = train.main([*FLAGS, *EAT])
    assert sizes == [32, 32, 11] * 2
    ours, theirs = weights(plain), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Recorder(Scheme):
    """Linf and L1 in turn, by a count of its own; remembers what each draw knew."""

    name = "recorder"
    summary = "alternates the norms"
    options = (Option("recorder_bias", "what the count starts at", from_scratch=0, fine_tuning=0),)
    known: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(
        self, threats: Sequence[Threat], n_iters: Sequence[int] = (), options: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(threats, n_iters, options)
        self.count = int((options or {})["recorder_bias"])

    def draw(self, n: int, step: int, generator: torch.Generator) -> Tensor:
        self.known.append((step, sum(self.errors.seen)))
        self.count += 1
        return torch.full((n,), self.count % 2)

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        return AdversarialBatch(self.attacks[int(sampled[0])](model, x, y).x_best[None], sampled[None])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(SCHEMES, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "known", [])
    return Recorder


def test_a_draw_knows_all_steps_but_the_last(recorder: type[Recorder]) -> None:
    train.main([*FLAGS, "--attack=apgd", "--multinorm=recorder", "--at_iter=1"])
    # Three steps an epoch; at an epoch's end all are counted.
    assert recorder.known == [(0, 0), (1, 0), (2, 32), (3, 75), (4, 75), (5, 107)]


@pytest.mark.parametrize("stop_before", [1, 2, 4])
def test_a_scheme_with_a_state_of_its_own_is_resumed(
    stop_before: int, recorder: type[Recorder], cut_off: Callable[..., None]
) -> None:
    flags = [*FLAGS, "--attack=apgd", "--multinorm=recorder", "--recorder-bias=7", "--at_iter=1", "--save_every=1e-9"]
    whole = train.main([*flags, "--save_dir=whole"])
    cut_off(stop_before, *flags, "--save_dir=cut")
    again = train.main([*flags, "--save_dir=cut", "--resume"])
    assert weights(again).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert json.loads((again / "config.json").read_text())["recorder_bias"] == 7


def test_a_state_of_another_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = train.main([*FLAGS, *EAT])
    config = json.loads((folder / "config.json").read_text())
    del config["eval_norms"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        train.main([f"--resume={folder}"])
    assert end.value.code == 2
    assert "another version of train.py" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--multinorm=eat"], ["--multinorm=ramp", "--gradient_projection"]])
def test_a_run_that_ends_in_its_evaluation_does_not_train_the_epoch_again(
    more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FLAGS, "--attack=apgd", "--at_iter=2", "--eval_freq=1", "--n_ex_eval=4", *more]
    whole = train.main([*flags, "--save_dir=whole"])
    evaluation = train.quick_evaluation

    def cut_off(*args: Any) -> Any:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(train, "quick_evaluation", cut_off)
        with pytest.raises(SystemExit):
            train.main([*flags, "--save_dir=cut"])
    steps, optimizer_step = [], train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (steps.append(1), optimizer_step(*args)))
    assert train.quick_evaluation is evaluation
    again = train.main([*flags, "--save_dir=cut", "--resume"])
    assert len(steps) == (6 if "--gradient_projection" in more else 3), "the second epoch alone"
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    records = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, again)
    ]
    assert records[0] == records[1]
