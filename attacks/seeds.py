"""Random generators by key, the same on every machine, without numpy."""

from __future__ import annotations

from collections.abc import Callable

import torch

MASK = 2**32 - 1


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the key, whole numbers such as (seed, example, run). Raises ValueError for one < 0.

    The seed is that of numpy's SeedSequence (O'Neill's seed_seq_fe, with a pool of four words): its first two 32-bit words.
    """
    if min(key, default=0) < 0:
        raise ValueError(f"keys of generators are whole numbers >= 0, got {list(key)}")
    entropy = [len(key), *key]
    words = [number >> shift & MASK for number in entropy for shift in range(0, max(number.bit_length(), 1), 32)]
    hashed, drawn = _hash(0x43B0D7E5, 0x931E8875), _hash(0x8B51F9DD, 0x58F38DED)

    def mixed(one: int, other: int) -> int:
        word = (0xCA01F9DD * one - 0x4973F715 * other) & MASK
        return word ^ word >> 16

    pool = [hashed(word) for word in (words + 4 * [0])[:4]]
    for source in range(4):
        for place in range(4):
            if place != source:
                pool[place] = mixed(pool[place], hashed(pool[source]))
    for word in words[4:]:
        pool = [mixed(old, hashed(word)) for old in pool]
    low, high = drawn(pool[0]), drawn(pool[1])
    return torch.Generator().manual_seed((high << 32 | low) >> 1)


def _hash(factor: int, multiplier: int) -> Callable[[int], int]:
    """A hash of 32-bit words, another one at each call."""

    def hashed(word: int) -> int:
        nonlocal factor
        word ^= factor
        factor = factor * multiplier & MASK
        word = word * factor & MASK
        return word ^ word >> 16

    return hashed
