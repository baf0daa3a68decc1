"""Conditions of the attacks: one for each example, or one for all that the host knows, and then nothing is launched for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .projections import expand_per_example

Flag = Tensor | bool  # (B,) bool on the device, or the same for all examples


def where(flag: Flag, chosen: Tensor | float, other: Tensor) -> Tensor:
    """`chosen` for the examples of the flag, else `other` (B, ...)."""
    if isinstance(flag, Tensor):
        return torch.where(expand_per_example(flag, other), chosen, other)
    if not flag:
        return other
    return chosen if isinstance(chosen, Tensor) else torch.full_like(other, chosen)


def either(one: Flag, other: Flag) -> Flag:
    """Logical or."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one | other
    known, open_ = (other, one) if isinstance(one, Tensor) else (one, other)
    return True if known else open_


def both(one: Flag, other: Flag) -> Flag:
    """Logical and."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one & other
    known, open_ = (other, one) if isinstance(one, Tensor) else (one, other)
    return open_ if known else False
