"""RAMP's gradient projection against its equation, and saved half-way."""

import copy

import pytest
import torch
from torch import nn

from training.gradient_projection import GradientProjection


def halves(model: nn.Linear, natural: list[float], adversarial: list[float]) -> GradientProjection:
    """A projection whose two halves change the weights (here (2,)) by so much."""
    projection = GradientProjection(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    projection.begin()
    with torch.no_grad():
        model.weight += torch.tensor(natural)
        projection.switch()
        model.weight += torch.tensor(adversarial)
    return projection


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("natural", "adversarial", "expected"),
    [
        ([3.0, 4.0], [6.0, 8.0], [4.5, 6.0]),  # cosine 1: half of each
        ([3.0, 4.0], [5.0, 0.0], [3.4, 1.2]),  # cosine 0.6: 0.3 (3, 4) + 0.5 (5, 0)
        ([3.0, 4.0], [-3.0, -4.0], [-1.5, -2.0]),  # cosine -1: none of the natural one
        ([0.0, 0.0], [1.0, 2.0], [0.5, 1.0]),
    ],
)
def test_by_hand(model: nn.Linear, natural: list[float], adversarial: list[float], expected: list[float]) -> None:
    start = copy.deepcopy(model)
    halves(model, natural, adversarial).end()
    torch.testing.assert_close(model.weight - start.weight, torch.tensor([expected]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, start.bias)  # a layer of its own, which did not move


def test_statistics_are_the_adversarial_halves() -> None:
    model = nn.BatchNorm1d(2)
    projection = GradientProjection(model, torch.optim.SGD(model.parameters(), lr=0.1))
    projection.begin()
    model(torch.tensor([[10.0, 10.0], [20.0, 20.0]]))
    projection.switch()
    assert model.running_mean.tolist() == [0, 0]
    model(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    projection.end()
    assert model.running_mean.tolist() == pytest.approx([0.2, 0.3])


def test_saved_half_way(model: nn.Linear) -> None:
    projection = halves(model, [3.0, 4.0], [5.0, 0.0])
    other = copy.deepcopy(model)
    again = GradientProjection(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    again.load_state_dict(projection.state_dict())
    projection.end()
    again.end()
    assert torch.equal(model.weight, other.weight)
