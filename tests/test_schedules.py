"""Learning-rate schedules at their exact borders, and the small pieces of the training loop."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from training.optim import parameter_groups, set_lr
from utils.distributed import choose_device
from utils.modules import eval_mode, generator, no_param_grad
from utils.schedules import lr_schedule


@pytest.mark.parametrize("steps", [1, 7, 98, 391])
@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [
        ("piecewise", 80, [40, 60]),
        ("piecewise", 4, [2, 3]),
        ("piecewise-ft", 3, [1, 2]),
        ("piecewise-ft", 30, [10, 20]),
        ("piecewise-70-10", 80, [70]),
        ("piecewise-70-10", 8, [7]),
        ("piecewise-1-1-1", 3, [1, 2]),
        ("piecewise-10-20-30-40", 100, [10, 30, 60]),
        ("piecewise-5", 10, []),
    ],
)
def test_piecewise_drops_at_the_border(name: str, epochs: int, drops: list[int], steps: int) -> None:
    schedule = lr_schedule(name, 0.05)
    total = epochs * steps
    rates = [schedule(step / total) for step in range(total)]
    expected = [0.05 / 10 ** sum(step >= drop * steps for drop in drops) for step in range(total)]
    assert rates == pytest.approx(expected)


def test_superconverge() -> None:
    schedule = lr_schedule("superconverge", 0.1)
    for progress, expected in ((0, 0), (0.1, 0.025), (0.2, 0.05), (0.4, 0.1), (0.7, 0.05), (0.85, 0.025), (1, 0)):
        assert schedule(progress) == pytest.approx(expected, abs=1e-12)
    assert max(schedule(step / 1000) for step in range(1000)) == pytest.approx(0.1)


def test_cosine_and_linear() -> None:
    for name, values in {"cosine": (0.1, 0.05 + 0.05 / 2**0.5, 0.05), "linear": (0.1, 0.075, 0.05)}.items():
        assert [lr_schedule(name, 0.1)(progress) for progress in (0, 0.25, 0.5)] == pytest.approx(values)
        assert lr_schedule(name, 0.1)(0.9999) < 1e-4


@pytest.mark.parametrize("name", ["cosine", "linear", "piecewise", "superconverge"])
def test_warmup_rises_from_nothing_to_the_schedule(name: str) -> None:
    plain, warm = lr_schedule(name, 0.1), lr_schedule(name, 0.1, warmup=0.2)
    for progress in (0, 0.05, 0.1, 0.2, 0.6):
        assert warm(progress) == pytest.approx(plain(progress) * min(progress / 0.2, 1))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cosine-2",
        "Piecewise",
        "piecewise-",
        "piecewise-x",
        "piecewise-70-",
        "piecewise-70--10",
        "piecewise-0-10",
        "piecewise-1.5-2",
        "superconverge-1",
        "piecewise-ft-10",
        "-70-10",
    ],
)
def test_unknown_schedule(name: str) -> None:
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_schedule(name, 0.05)


def network() -> nn.Sequential:
    """Convolution, norm, linear."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_parameter_groups_are_a_partition() -> None:
    model = network()
    weights, others = parameter_groups(model, 0.05, 5e-4, None)
    ids = [id(p) for group in (weights, others) for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[3].weight)}  # type: ignore[attr-defined]
    assert (weights["weight_decay"], others["weight_decay"]) == (5e-4, 0)
    assert (weights["lr"], others["lr"]) == (0.05, 0.05)


@pytest.mark.parametrize(("lr_no_decay", "last"), [(None, 0.005), (1.0, 1.0)])
def test_set_lr_leaves_a_constant_rate(lr_no_decay: float | None, last: float) -> None:
    optimizer = torch.optim.SGD(parameter_groups(network(), 0.05, 5e-4, lr_no_decay), lr=0.05, momentum=0.9)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, lr_no_decay or 0.05]
    set_lr(optimizer, 0.005)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, last]


def test_set_lr_of_a_plain_optimizer() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.05)
    set_lr(optimizer, 0.01)
    assert optimizer.param_groups[0]["lr"] == 0.01


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_eval_mode_restores_a_frozen_norm() -> None:
    model = network().train()
    model[1].eval()
    before = modes(model)
    with eval_mode(model) as inside:
        assert inside is model
        assert not any(modes(model))
    assert modes(model) == before == [True, True, False, True, True]


def test_eval_mode_and_frozen_restore_after_an_exception() -> None:
    model = network().train()
    model[1].eval()
    before = modes(model)
    with pytest.raises(KeyError), eval_mode(model), no_param_grad(model):
        raise KeyError
    assert modes(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_restores_each_parameter() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with no_param_grad(model) as inside:
        assert inside is model
        assert not any(p.requires_grad for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
    assert before.count(False) == 1


def test_generator_depends_on_the_key_alone() -> None:
    keys = [(seed, epoch, step) for seed in range(3) for epoch in range(3) for step in range(3)]
    draws = [torch.rand(8, generator=generator(*key)) for key in keys]
    torch.rand(5)  # the global generator plays no part
    for key, numbers in zip(keys, draws, strict=True):
        assert torch.equal(torch.rand(8, generator=generator(*key)), numbers)
    assert not any(torch.equal(a, b) for a, b in combinations(draws, 2))


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(ValueError, match="device"):
            choose_device(name)
