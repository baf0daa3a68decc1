"""Each warning of the evaluation, with a network that deserves it."""

import pytest
import torch
from torch import Tensor, nn

from attacks.checks import network_warnings, result_warnings
from attacks.results import AttackLog, AttackRun, Evaluation
from attacks.threat import Threat


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, 4, 4, generator=generator), torch.arange(40) % 10


class Network(nn.Module):
    """Linear; `kind` names what is wrong with it."""

    def __init__(self, kind: str = "", classes: int = 10) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(16, classes, generator=torch.Generator().manual_seed(1)))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "trains":
            self.norm.train()
        x = self.norm(x.flatten(1))
        if self.kind == "random":
            x = x + 0.3 * torch.randn_like(x)
        logits = x @ self.weight
        if self.kind == "saturated":
            logits = 1e4 * logits
        return logits.softmax(1) if self.kind == "softmax" else logits


def found(kind: str, classes: int = 10) -> list[str]:
    x, _ = points()
    y = Network("", classes).eval()(x).argmax(1)
    return network_warnings(Network(kind, classes).eval().requires_grad_(False), x, y)


def test_a_sound_network_gets_no_warning() -> None:
    assert found("") == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [("random", "are random"), ("softmax", "probabilities"), ("trains", "train mode"), ("saturated", "gradient")],
)
def test_a_network_that_deserves_it_is_warned_of(kind: str, words: str) -> None:
    assert any(words in warning for warning in found(kind))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_told(classes: int) -> None:
    [warning] = found("", classes)
    assert f"{classes} classes" in warning


@pytest.mark.parametrize(("late", "warned"), [(0, False), (2, False), (3, True), (30, True)])
def test_runs_that_still_break_at_the_end(late: int, warned: bool) -> None:
    n, runs = 200, [AttackRun("CE"), AttackRun("T", 1)]
    broken_by = torch.tensor([1] * late + [0] * 50 + [-1] * (n - 50 - late))
    log = AttackLog(
        runs, torch.ones(n, 2, dtype=torch.int32), broken_by, torch.zeros(n, dtype=torch.bool), torch.zeros(n, 2)
    )
    told = result_warnings(Evaluation(torch.ones(n, dtype=torch.bool), {Threat("L2", 0.5): log}))
    assert len(told) == warned
    assert all("L2 0.5" in warning and str(late) in warning for warning in told)
