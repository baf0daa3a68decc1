"""Random generators by key, the same on every machine, without numpy."""

from __future__ import annotations

import torch

MASK = 2**32 - 1


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but the key, whole numbers >= 0 such as (seed, example, run)."""
    low, high = _seed_sequence([len(key), *key])
    return torch.Generator().manual_seed((high << 32 | low) >> 1)


def _seed_sequence(entropy: list[int]) -> tuple[int, int]:
    """The first two 32-bit words of numpy's SeedSequence (O'Neill's seed_seq_fe, with a pool of four words). Raises ValueError."""
    if min(entropy) < 0:
        raise ValueError(f"keys of generators are whole numbers >= 0, got {entropy[1:]}")
    words = [number >> shift & MASK for number in entropy for shift in range(0, max(number.bit_length(), 1), 32)]
    factor = 0x43B0D7E5

    def hashed(word: int) -> int:
        nonlocal factor
        word ^= factor
        factor = factor * 0x931E8875 & MASK
        word = word * factor & MASK
        return word ^ word >> 16

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
    factor, out = 0x8B51F9DD, []
    for word in pool[:2]:
        word ^= factor
        factor = factor * 0x58F38DED & MASK
        word = word * factor & MASK
        out.append(word ^ word >> 16)
    return out[0], out[1]
