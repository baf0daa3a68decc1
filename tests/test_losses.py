"""The losses against hand calculations in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks.losses import cross_entropy, dlr, dlr_targeted, margin_targeted

FEW = settings(deadline=None, database=None, max_examples=100, derandomize=True)
# Whole and half numbers: ties happen, and differences are exact.
ROWS = st.lists(st.integers(-40, 40).map(lambda value: value / 2), min_size=4, max_size=12)


def of_row(loss: object, row: list[float], *labels: int) -> float:
    """The loss of one example, in float64."""
    out: Tensor = loss(torch.tensor([row], dtype=torch.float64), *(torch.tensor([label]) for label in labels))  # type: ignore[operator]
    assert out.shape == (1,)
    return float(out)


def dlr_by_hand(row: list[float], y: int) -> float:
    ordered = sorted(row, reverse=True)
    other = max(value for i, value in enumerate(row) if i != y)
    return -(row[y] - other) / (ordered[0] - ordered[2])


@FEW
@given(ROWS, st.data())
def test_cross_entropy(row: list[float], data: st.DataObject) -> None:
    y = data.draw(st.integers(0, len(row) - 1))
    expected = math.log(sum(math.exp(value) for value in row)) - row[y]
    assert of_row(cross_entropy, row, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@FEW
@given(ROWS, st.data())
def test_dlr(row: list[float], data: st.DataObject) -> None:
    y = data.draw(st.integers(0, len(row) - 1))
    ordered = sorted(row, reverse=True)
    if ordered[0] != ordered[2]:
        assert of_row(dlr, row, y) == pytest.approx(dlr_by_hand(row, y), rel=1e-9, abs=1e-9)


@FEW
@given(ROWS, st.data())
def test_dlr_targeted(row: list[float], data: st.DataObject) -> None:
    y, target = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=2, max_size=2, unique=True))
    ordered = sorted(row, reverse=True)
    width = ordered[0] - (ordered[2] + ordered[3]) / 2
    if width:
        expected = -(row[y] - row[target]) / width
        assert of_row(dlr_targeted, row, y, target) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@FEW
@given(ROWS, st.data())
def test_margin_targeted(row: list[float], data: st.DataObject) -> None:
    y, target = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=2, max_size=2, unique=True))
    assert of_row(margin_targeted, row, y, target) == row[target] - row[y]


@pytest.mark.parametrize(
    ("row", "y", "expected"),
    [
        ([3.0, 1.0, 0.0], 0, -2 / 3),  # right
        ([3.0, 1.0, 0.0], 1, 2 / 3),  # the label second
        ([3.0, 1.0, 0.0], 2, 1.0),  # the label last
        ([2.0, 2.0, 1.0], 0, 0.0),  # a tie with the label at the top
        ([2.0, 2.0, 1.0], 1, 0.0),
        ([2.0, 1.0, 1.0], 0, -1.0),  # a tie below the label
        ([2.0, 1.0, 1.0], 2, 1.0),
    ],
)
def test_dlr_by_hand(row: list[float], y: int, expected: float) -> None:
    assert of_row(dlr, row, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("y", "target", "expected"), [(0, 3, -4 / 2.5), (3, 0, 4 / 2.5), (1, 2, -1 / 2.5)])
def test_dlr_targeted_by_hand(y: int, target: int, expected: float) -> None:
    row = [4.0, 3.0, 2.0, 0.0, 1.0]  # in order 4, 3, 2, 1: the denominator is 4 - (2 + 1) / 2
    assert of_row(dlr_targeted, row, y, target) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", [cross_entropy, dlr])
def test_all_logits_equal_is_finite(loss: object) -> None:
    assert math.isfinite(of_row(loss, [1.0] * 5, 2))


@FEW
@given(ROWS, st.data(), st.floats(0.1, 100), st.floats(-100, 100))
def test_dlr_ignores_shift_and_scale(row: list[float], data: st.DataObject, scale: float, shift: float) -> None:
    y, target = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=2, max_size=2, unique=True))
    ordered = sorted(row, reverse=True)
    moved = [scale * value + shift for value in row]
    if ordered[0] != ordered[2] and ordered[0] != ordered[1]:
        assert of_row(dlr, moved, y) == pytest.approx(of_row(dlr, row, y), rel=1e-6, abs=1e-6)
        assert of_row(dlr_targeted, moved, y, target) == pytest.approx(
            of_row(dlr_targeted, row, y, target), rel=1e-6, abs=1e-6
        )


def test_rows_are_independent() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    y, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
    for loss in (cross_entropy, dlr):
        assert torch.equal(loss(logits, y), torch.cat([loss(logits[i : i + 1], y[i : i + 1]) for i in range(6)]))
    for targeted in (dlr_targeted, margin_targeted):
        alone = [targeted(logits[i : i + 1], y[i : i + 1], target[i : i + 1]) for i in range(6)]
        assert torch.equal(targeted(logits, y, target), torch.cat(alone))
