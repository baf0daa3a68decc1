"""Threat models: what an adversary may do to an image with pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .norms import NORMS, NormSpec

SMALLEST = 1e-6  # radius; float32 pixels are rounded to about 1e-7


@dataclass(frozen=True)
class Threat:
    """What the adversary may do: ||delta||_norm <= eps and x + delta in [0, 1]. Raises ValueError for a bad norm or radius."""

    norm: str  # one of NORMS: "Linf", "L2", "L1"
    eps: float  # in pixels of [0, 1]: 8/255, 0.5, 12

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"the norm must be one of {' '.join(NORMS)}, got {self.norm!r}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"the radius must be positive and finite, got {self.eps}")

    def __str__(self) -> str:
        return f"{self.norm} {self.eps:.4g}"

    @property
    def spec(self) -> NormSpec:
        """All that is known of the norm."""
        return NORMS[self.norm]

    def contains(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """(B,) bool: is x_adv (B, ...) an allowed version of x (B, ...)? False for NaN.

        The box is checked to the bit, the ball in float64 up to the rounding of float32 pixels: an error of 2**-24 a pixel.
        """
        inside = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        delta = x_adv.double() - x.double()
        rounding = self.spec.size(torch.full_like(delta[:1], 2.0**-24))
        return inside & (self.spec.size(delta) <= self.eps * (1 + 1e-6) + rounding)


def threats(norms: Sequence[str], radii: Sequence[float]) -> list[Threat]:
    """One threat model per norm, with its radius for pixels in [0, 1].

    Raises ValueError for a norm named twice, another number of radii, and radii that must be a slip: the whole box, or below rounding.
    """
    if len(set(norms)) != len(norms):
        raise ValueError(f"each norm may be named once, got {' '.join(norms)}")
    if len(radii) != len(norms):
        raise ValueError(f"one radius for each norm is needed: {len(norms)} ({' '.join(norms)}), got {len(radii)}")
    found = [Threat(norm, radius) for norm, radius in zip(norms, radii, strict=True)]
    for threat in found:
        if threat.spec.per_pixel and threat.eps >= 1:
            raise ValueError(f"{threat} is the whole box, as pixels are in [0, 1]; did you mean {threat.eps:g}/255?")
        if threat.eps < SMALLEST:
            raise ValueError(f"a radius of {threat.eps:g} in {threat.norm} is below {SMALLEST:g}, which rounding hides")
    return found
