"""Random generators, intervals and tables without numpy and scipy: the same as theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from attacks.results import AttackLog, AttackRun, Attempt, Evaluation, mean_interval, table, wilson_interval
from attacks.seeds import generator
from attacks.threat import Threat
from utils import modules

MANY = settings(deadline=None, database=None, max_examples=300, derandomize=True)
WORDS = st.one_of(st.integers(0, 3), st.integers(0, 2**32), st.integers(0, 2**100), st.sampled_from([2**32 - 1, 2**64]))


@MANY
@given(st.lists(WORDS, max_size=8))
def test_generators_are_those_of_numpys_seed_sequence(key: list[int]) -> None:
    seed = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    assert generator(*key).initial_seed() == int(seed)


def test_generators_are_those_of_training() -> None:
    for key in ((), (0,), (3, 1, 4, 1, 5)):
        assert torch.equal(torch.rand(3, generator=generator(*key)), torch.rand(3, generator=modules.generator(*key)))


def test_a_key_is_not_negative() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        generator(0, -1)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 500, 1000, 10000])
def test_wilsons_interval_is_scipys(n: int) -> None:
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        theirs = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson_interval(0, n)[0] == 0
    assert wilson_interval(n, n)[1] == 1


@pytest.mark.parametrize("n", [2, 3, 60])
def test_the_average_has_the_mean_interval(n: int) -> None:
    values = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)).double() / 3
    mean, half = float(values.mean()), 1.96 * float(np.std(values.numpy(), ddof=1)) / n**0.5
    assert mean_interval(values) == pytest.approx((max(mean - half, 0), min(mean + half, 1)), abs=1e-12)
    assert mean_interval(values[:1]) == (0, 1)


def test_the_print_is_a_table_with_warnings_below() -> None:
    log = AttackLog.empty([AttackRun("CE"), AttackRun("T", 1)], 4)
    log.add([Attempt(0, 0, 7, True), Attempt(0, 1, 9, False), Attempt(1, 1, 3, True)])
    assert log.passes.tolist() == [[7, 0], [9, 3], [0, 0], [0, 0]]
    assert log.broken_by.tolist() == [0, 1, -1, -1]
    assert log.next_run.tolist() == [1, 2, 0, 0]
    evaluation = Evaluation(torch.tensor([True, True, True, False]), {Threat("L2", 0.5): log}, warnings=["too few"])
    expected = """\
                            accuracy   95 % interval   images
  clean                       75.00 %  [ 30.1,  95.4]        4
  L2                          25.00 %  [  4.6,  69.9]        4
  average                     25.00 %  [  0.0,  74.0]        4
  union                       25.00 %  [  4.6,  69.9]        4
WARNING: too few"""
    assert str(evaluation) == expected
    assert table({}, "title") == "title                       accuracy   95 % interval   images"
