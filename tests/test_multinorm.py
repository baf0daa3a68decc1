"""E-AT's draw: even at first, then in proportion to the running error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.multinorm import EAT
from attacks.threat import Threat

LINF, L2, L1 = Threat("Linf", 0.1), Threat("L2", 0.5), Threat("L1", 3.0)


def test_even_until_each_threat_was_met() -> None:
    eat = EAT([LINF, L2, L1])
    assert eat.probabilities() == pytest.approx([1 / 3] * 3)
    eat.observe(0, torch.tensor(1), 10)
    eat.observe(2, torch.tensor(9), 10)
    assert eat.errors() == pytest.approx([0.9, 1, 0.1])
    assert eat.probabilities() == pytest.approx([1 / 3] * 3)
    eat.observe(1, torch.tensor(5), 10)
    eat.errors()
    assert eat.probabilities() == pytest.approx([0.9 / 1.5, 0.5 / 1.5, 0.1 / 1.5])


@settings(deadline=None, database=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=30),
)
def test_probabilities_follow_the_counts_of_the_whole_run(updates: list[tuple[int, int, float]]) -> None:
    eat = EAT([LINF, L1])
    right, seen = [0, 0], [0, 0]
    for index, size, share in updates:
        eat.observe(index, torch.tensor(int(share * size)), size)
        right[index] += int(share * size)
        seen[index] += size
    told = eat.errors()
    assert (eat.right, eat.seen) == (right, seen)
    assert sum(eat.probabilities()) == pytest.approx(1)
    if all(seen):
        errors = [1 - r / s for r, s in zip(right, seen, strict=True)]
        assert told == pytest.approx(errors)
        expected = [error / sum(errors) for error in errors] if sum(errors) else [0.5, 0.5]
        assert eat.probabilities() == pytest.approx(expected)
    else:
        assert eat.probabilities() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("rights", [(20, 80), (50, 50), (100, 60), (0, 99)])
def test_draws_have_these_frequencies(rights: tuple[int, int]) -> None:
    eat = EAT([LINF, L1])
    for index, right in enumerate(rights):
        eat.observe(index, torch.tensor(right), 100)
    eat.errors()
    draws, generator = 10_000, torch.Generator().manual_seed(0)
    ones = sum(eat.draw(generator) for _ in range(draws))
    chance = (100 - rights[1]) / (200 - sum(rights))
    assert abs(ones / draws - chance) <= 3 * (chance * (1 - chance) / draws) ** 0.5


def test_a_draw_waits_for_all_updates_but_the_last() -> None:
    eat = EAT([LINF, L1])
    eat.observe(0, torch.tensor(2), 10)
    eat.observe(1, torch.tensor(10), 10)
    eat.draw(torch.Generator())
    assert (eat.right, eat.seen) == ([2, 0], [10, 0])
    eat.observe(1, torch.tensor(3), 10)
    eat.draw(torch.Generator())
    assert (eat.right, eat.seen) == ([2, 10], [10, 10])
    assert eat.errors() == pytest.approx([0.8, 1 - 13 / 20])


def test_all_robust_is_even() -> None:
    eat = EAT([LINF, L1])
    for index in range(2):
        eat.observe(index, torch.tensor(10), 10)
    assert eat.errors() == [0, 0]
    assert eat.probabilities() == [0.5, 0.5]
    assert {eat.draw(torch.Generator().manual_seed(seed)) for seed in range(20)} == {0, 1}


@pytest.mark.parametrize("right", [None, 0, 5, 10])
def test_single_threat_is_always_drawn(right: int | None) -> None:
    eat = EAT([L2])
    if right is not None:
        eat.observe(0, torch.tensor(right), 10)
    generator = torch.Generator().manual_seed(0)
    assert eat.probabilities() == [1]
    assert {eat.draw(generator) for _ in range(50)} == {0}


def test_same_generator_same_draws() -> None:
    eat = EAT([LINF, L2, L1])
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    assert [eat.draw(first) for _ in range(50)] == [eat.draw(second) for _ in range(50)]


def test_a_saved_draw_goes_on_as_if_never_saved() -> None:
    eat, again = EAT([LINF, L1]), EAT([LINF, L1])
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    for step in range(60):
        if step % 7 == 0:  # also right after an update that the next draw does not know
            state = eat.state_dict()
            again = EAT([LINF, L1])
            again.load_state_dict(state)
            second.set_state(first.get_state())
        drawn = eat.draw(first)
        assert again.draw(second) == drawn
        for each in (eat, again):
            each.observe(drawn, torch.tensor((5 * step) % 11), 10)
    assert eat.errors() == again.errors()
