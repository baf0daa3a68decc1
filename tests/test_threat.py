"""Threat models: validation, what they contain, and radii that make each norm count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attacks.norms import NORMS
from attacks.threat import Threat, threats
from config import threats_of
from data import DATASETS

INPUTS = {"digits": 64, "cifar10": 3072, "cifar100": 3072, "imagenet": 150528, "imagefolder": 150528}


@pytest.mark.parametrize("norm", ["L0", "linf", "", "Linf "])
def test_unknown_norm(norm: str) -> None:
    with pytest.raises(ValueError, match="Linf L2 L1"):
        Threat(norm, 0.1)


@pytest.mark.parametrize("eps", [0, -1, float("inf"), float("nan")])
def test_bad_radius(eps: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        Threat("Linf", eps)


def test_str_and_equality() -> None:
    assert str(Threat("Linf", 8 / 255)) == "Linf 0.03137"
    assert {Threat("L1", 12.0): 1}[Threat("L1", 12.0)] == 1


@pytest.mark.parametrize(("dataset", "n"), list(INPUTS.items()))
@pytest.mark.parametrize("norm", NORMS)
def test_contains_up_to_the_border(dataset: str, n: int, norm: str) -> None:
    threat = Threat(norm, DATASETS[dataset].radii[norm])
    direction = torch.rand(4, n, generator=torch.Generator().manual_seed(0)).double() - 0.5
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    border = threat.eps * direction / direction.norm(p=order, dim=1, keepdim=True)
    x = torch.full((4, n), 0.5)
    for factor, allowed in ((0, True), (0.9, True), (1, True), (1 + 5e-5, False), (1.1, False)):
        x_adv = (x + factor * border).float() if norm != "L1" else x.double() + factor * border
        assert threat.contains(x, x_adv).tolist() == [allowed] * 4, factor


@pytest.mark.parametrize("norm", NORMS)
def test_one_entry_at_the_border(norm: str) -> None:
    threat, x = Threat(norm, 0.25), torch.zeros(3, 4)
    x_adv = torch.zeros(3, 4)
    x_adv[:, 2] = torch.tensor([0.25, 0.25 + 1e-5, 0.25 - 1e-5])
    assert threat.contains(x, x_adv).tolist() == [True, False, True]


@pytest.mark.parametrize("norm", NORMS)
def test_box_is_checked_to_the_bit(norm: str) -> None:
    threat = Threat(norm, 0.5)
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    x_adv = torch.tensor([[0.0], [-1e-30], [1.0], [1.0 + 2**-23]])
    assert threat.contains(x, x_adv).tolist() == [True, False, True, False]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_not_contained(norm: str, bad: float) -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    x_adv = x.clone()
    x_adv[1, 2, 3, 3] = bad
    assert Threat(norm, 20.0).contains(x, x_adv).tolist() == [True, False]


def test_threats_of_a_data_set() -> None:
    assert threats_of("cifar10", ["Linf", "L2", "L1"], None) == [
        Threat("Linf", 8 / 255),
        Threat("L2", 0.5),
        Threat("L1", 12),
    ]
    assert threats_of("digits", ["L1", "L2"], None, {"L2": 0.7}) == [Threat("L1", 2.0), Threat("L2", 0.7)]
    assert threats_of("cifar10", ["L1", "Linf"], [3.0, 0.1]) == [Threat("L1", 3.0), Threat("Linf", 0.1)]
    with pytest.raises(ValueError, match="no radius of its own for L7"):
        threats_of("cifar10", ["L1", "L7"], None)


def test_radii_that_must_be_a_slip() -> None:
    for norm, eps, word in (("Linf", 8.0, "8/255"), ("Linf", 1.0, "whole box"), ("L2", 1e-7, "rounding")):
        with pytest.raises(ValueError, match=word):
            threats([norm], [eps])
    assert threats(["Linf", "L2", "L1"], [0.99, 1e-6, 3000.0])[1].eps == 1e-6


def test_threats() -> None:
    assert threats(["L1", "Linf"], [3.0, 0.1]) == [Threat("L1", 3.0), Threat("Linf", 0.1)]
    with pytest.raises(ValueError, match="once"):
        threats(["L1", "L1"], [1.0, 2.0])
    with pytest.raises(ValueError, match="L0"):
        threats(["L1", "L0"], [1.0, 2.0])


@pytest.mark.parametrize("eps", [[], [0.1], [0.1, 0.2, 0.3]])
def test_another_number_of_radii(eps: list[float]) -> None:
    with pytest.raises(ValueError, match="one radius for each norm"):
        threats(["Linf", "L1"], eps)


@pytest.mark.parametrize(("dataset", "n"), list(INPUTS.items()))
def test_no_ball_contains_another(dataset: str, n: int) -> None:
    radii = DATASETS[dataset].radii
    assert set(radii) == set(NORMS)
    # From the largest order to the smallest: ||.||_q <= ||.||_p <= n ** (1/p - 1/q) ||.||_q.
    for larger, smaller in pairwise(("Linf", "L2", "L1")):
        assert radii[larger] < radii[smaller] < n**0.5 * radii[larger]
    assert radii["Linf"] < radii["L1"] < n * radii["Linf"]
