"""All that the attacks know of a norm, in one object each: a new norm is a NormSpec given to `register_norm`, and nothing else."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .controllers import HalvingController, SparseController, StepController
from .directions import steepest_l1, steepest_l2, steepest_linf
from .projections import expand_per_example, project_l1, project_l2, project_linf

Stages = Sequence[tuple[float, int]]  # (radius, steps) of each stage of a run


def one_stage(eps: float, n_iter: int) -> Stages:
    """All steps at the radius itself."""
    return [(eps, n_iter)]


def shrinking(eps: float, n_iter: int) -> Stages:
    """Three stages of radius 3, 2 and 1 eps with 30, 30 and 40 % of the steps: how L1 is evaluated (arXiv 2103.01208, section 4)."""
    first = int(0.3 * n_iter)
    return [(3 * eps, first), (2 * eps, first), (eps, n_iter - 2 * first)]


@dataclass(frozen=True)
class NormSpec:
    """A norm ||.|| of perturbations delta = x_adv - x. B examples, any image shape; radii eps in pixels of [0, 1]."""

    name: str
    project: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(delta (B, ...), x (B, ...), eps (B,)) -> the nearest delta with ||delta|| <= eps and x + delta in [0, 1]."""
    steepest: Callable[[Tensor, Tensor], Tensor]
    """(grad (B, ...), keep (B,)) -> direction of steepest ascent with ||.|| = 1; `keep`: entries that a sparse one has."""
    size: Callable[[Tensor], Tensor]
    """delta (B, ...) -> ||delta|| (B,), in the precision of delta; must grow with each |delta_i|."""
    random_start: Callable[[Tensor, float], Tensor]
    """(standard normal noise (B, ...), eps) -> delta (B, ...) where a run of an evaluation starts, before it is projected."""
    controller: type[StepController] = HalvingController  # step sizes and momentum of APGD
    stages: Callable[[float, int], Stages] = one_stage  # (eps, n_iter) -> a full run of an evaluation
    restarts: tuple[int, int] = (1, 9)  # runs of APGD-CE and of APGD-T in the standard evaluation
    brief_first: bool = False  # a run of n_iter / 5 steps at eps goes first, for the union before other norms' runs
    seed: int | None = None  # sets its random starts apart from other norms'; None: from its name
    pyautoattack: bool = False  # that library attacks in this norm, under this name
    per_pixel: bool = False  # eps bounds each pixel alone: told as n/255 where that is exact
    colour: str | None = None  # in pictures; None: the picture's next one

    @property
    def seed_number(self) -> int:
        """What stands for the norm in the keys of random generators."""
        return zlib.crc32(self.name.encode()) if self.seed is None else self.seed


def register_norm(spec: NormSpec) -> NormSpec:
    """Make the norm known by its name, to Threat and all attacks. Raises ValueError if that name is taken by another one."""
    if NORMS.get(spec.name, spec) != spec:
        raise ValueError(f"there is a norm called {spec.name!r} already")
    NORMS[spec.name] = spec
    return spec


def vector_norm(delta: Tensor, order: float) -> Tensor:
    """Lp norms (B,) of delta (B, ...)."""
    return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)


def uniform_in_cube(noise: Tensor, eps: float) -> Tensor:
    """Uniform in [-eps, eps] at each pixel."""
    return eps * (2 * torch.special.ndtr(noise) - 1)


def on_sphere(noise: Tensor, eps: float) -> Tensor:
    """Uniform on the sphere of L2 radius eps."""
    return eps * noise / expand_per_example(noise.flatten(1).norm(dim=1), noise)


def as_it_is(noise: Tensor, eps: float) -> Tensor:
    """Noise of deviation 1 whatever the radius, far outside an L1 ball: its projection is sparse."""
    return noise


NORMS: dict[str, NormSpec] = {}
register_norm(
    NormSpec(
        name="Linf",
        project=project_linf,
        steepest=steepest_linf,
        size=partial(vector_norm, order=float("inf")),
        random_start=uniform_in_cube,
        seed=0,
        pyautoattack=True,
        per_pixel=True,
        colour="#0072b2",
    )
)
register_norm(
    NormSpec(
        name="L2",
        project=project_l2,
        steepest=steepest_l2,
        size=partial(vector_norm, order=2.0),
        random_start=on_sphere,
        seed=1,
        pyautoattack=True,
        colour="#009e73",
    )
)
register_norm(
    NormSpec(
        name="L1",
        project=project_l1,
        steepest=steepest_l1,
        size=partial(vector_norm, order=1.0),
        random_start=as_it_is,
        controller=SparseController,
        stages=shrinking,
        restarts=(5, 5),
        brief_first=True,
        seed=2,
        pyautoattack=True,
        colour="#d55e00",
    )
)
