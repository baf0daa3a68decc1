"""The projections against float64 bisection, and against random allowed points: none may be nearer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks import projections
from attacks.norms import NORMS
from attacks.threat import Threat

ROWS = 3
SIZES = st.one_of(st.integers(1, 5), st.integers(6, 100), st.integers(101, 3072), st.just(3072))
CASES = {
    "n": SIZES,
    "scale": st.sampled_from([1e-3, 1.0, 1e2]),
    "eps": st.one_of(st.floats(0.01, 20), st.sampled_from([0.01, 8 / 255, 0.5, 3.0, 12.0, 20.0])),
    "heavy": st.booleans(),
    "seed": st.integers(0, 2**31),
}
EXHAUSTIVE = settings(deadline=None, database=None, max_examples=100, derandomize=True)


@pytest.fixture(params=[False, True], ids=["searching", "sorting"], scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """As on CPUs, and as on other devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projections, "sorts", lambda like: request.param)
        yield


def project(delta: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """With one radius for all rows."""
    return threat.spec.project(delta, x, torch.full((len(x),), threat.eps))


def draw(n: int, scale: float, heavy: bool, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """delta and x, both (ROWS, n): a third of x exactly 0 or 1, some steps exactly 0, heavy tails if asked for."""
    draws = torch.Generator().manual_seed(seed)
    x = (torch.rand(ROWS, n, generator=draws) * 1.5 - 0.25).clamp(0, 1)
    delta = scale * torch.randn(ROWS, n, generator=draws)
    if heavy:
        delta = delta * torch.randn(ROWS, n, generator=draws).mul(2).exp()
    return torch.where(torch.rand(ROWS, n, generator=draws) < 0.1, 0, delta), x, draws


def reference(delta: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """The projection in float64; threshold (L1) and shrink (L2) by 200 halvings."""
    delta, x = delta.double(), x.double()
    if norm == "Linf":
        return (x + delta.clamp(-eps, eps)).clamp(0, 1) - x
    size, room = delta.abs(), torch.where(delta > 0, 1 - x, x)

    def at(point: Tensor) -> Tensor:
        return torch.minimum((size - point).clamp(min=0) if norm == "L1" else size * point, room)

    order = 1 if norm == "L1" else 2
    good, bad = torch.zeros(len(x), 1).double(), torch.ones(len(x), 1).double()  # L2: shrinks
    if norm == "L1":
        good, bad = size.amax(1, keepdim=True), torch.zeros(len(x), 1).double()
    fits = torch.minimum(size, room).norm(p=order, dim=1, keepdim=True) <= eps
    for _ in range(200):
        middle = (good + bad) / 2
        inside = at(middle).norm(p=order, dim=1, keepdim=True) <= eps
        good, bad = torch.where(inside, middle, good), torch.where(inside, bad, middle)
    return delta.sign() * torch.where(fits, torch.minimum(size, room), at(good))


def tolerance(delta: Tensor) -> Tensor:
    """1e-5 of the largest entry of each row, or of 1, (B, 1)."""
    return 1e-5 * delta.double().abs().amax(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("norm", NORMS)
@EXHAUSTIVE
@given(**CASES)
def test_is_the_float64_projection(norm: str, n: int, scale: float, eps: float, heavy: bool, seed: int) -> None:
    delta, x, _ = draw(n, scale, heavy, seed)
    error = (project(delta, x, Threat(norm, eps)).double() - reference(delta, x, norm, eps)).abs()
    assert bool((error <= tolerance(delta)).all()), float(error.max())


@pytest.mark.parametrize("norm", NORMS)
@EXHAUSTIVE
@given(**CASES)
def test_result_is_allowed_and_stays(norm: str, n: int, scale: float, eps: float, heavy: bool, seed: int) -> None:
    delta, x, _ = draw(n, scale, heavy, seed)
    threat = Threat(norm, eps)
    once = project(delta, x, threat)
    assert once.shape == delta.shape
    assert once.dtype == delta.dtype
    assert bool(threat.contains(x, x + once).all())
    torch.testing.assert_close(project(once, x, threat), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, database=None, max_examples=60, derandomize=True)
@given(**CASES)
def test_no_allowed_point_is_nearer(norm: str, n: int, scale: float, eps: float, heavy: bool, seed: int) -> None:
    delta, x, draws = draw(n, scale, heavy, seed)
    found = project(delta, x, Threat(norm, eps)).double()
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    target, pixels = delta.double(), x.double()
    distance = (target - found).norm(dim=1)
    for kind in range(12):
        # Anywhere in the box, or towards the target; sparse or dense; then scaled into the ball.
        other = torch.rand(ROWS, n, generator=draws).double() - pixels
        if kind % 2:
            other = torch.rand(ROWS, n, generator=draws).double().pow(0.1 if kind % 4 == 1 else 4) * target
            other = (pixels + other).clamp(0, 1) - pixels
        if kind % 3 == 0:
            other = other * (torch.rand(ROWS, n, generator=draws) < 0.1)
        size = other.norm(p=order, dim=1, keepdim=True)
        other = other * (eps / size.clamp(min=1e-300)).clamp(max=1)
        for nearby in (1, 0.1, 0.001):
            point = found + nearby * (other - found)
            assert bool(((target - point).norm(dim=1) >= distance - tolerance(delta)[:, 0]).all())


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, database=None, max_examples=60, derandomize=True)
@given(n=SIZES, eps=CASES["eps"], seed=CASES["seed"])
def test_point_inside_is_unchanged(norm: str, n: int, eps: float, seed: int) -> None:
    delta, x, _ = draw(n, 1.0, False, seed)
    inside = (x + delta).clamp(0, 1) - x
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    inside = inside * (0.99 * eps / inside.norm(p=order, dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=0.99)
    torch.testing.assert_close(project(inside, x, Threat(norm, eps)), inside, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, database=None, max_examples=30, derandomize=True)
@given(n=SIZES, eps=CASES["eps"], seed=CASES["seed"])
def test_zero_stays_zero(norm: str, n: int, eps: float, seed: int) -> None:
    _, x, _ = draw(n, 1.0, False, seed)
    assert bool((project(torch.zeros_like(x), x, Threat(norm, eps)) == 0).all())


@pytest.mark.parametrize("norm", NORMS)
def test_images_and_rows_are_independent(norm: str) -> None:
    delta, x, _ = draw(3 * 8 * 8, 1.0, False, 0)
    together = project(delta.view(ROWS, 3, 8, 8), x.view(ROWS, 3, 8, 8), Threat(norm, 0.5))
    alone = torch.cat([project(delta[i : i + 1], x[i : i + 1], Threat(norm, 0.5)) for i in range(ROWS)])
    torch.testing.assert_close(together.flatten(1), alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("huge", [1e6, 1e20, 1e30])
def test_huge_steps_stay_finite_and_allowed(norm: str, huge: float) -> None:
    delta, x, _ = draw(64, 1.0, False, 1)
    found = project(huge * delta, x, Threat(norm, 0.5))
    assert bool(found.isfinite().all())
    assert bool(Threat(norm, 0.5).contains(x, x + found).all())


@pytest.mark.parametrize("norm", NORMS)
def test_each_row_has_its_own_radius(norm: str) -> None:
    delta, x, _ = draw(200, 1.0, False, 0)
    eps = torch.tensor([0.01, 0.5, 3.0])
    together = NORMS[norm].project(delta, x, eps)
    alone = [project(delta[i : i + 1], x[i : i + 1], Threat(norm, float(eps[i]))) for i in range(ROWS)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_radius_of_nothing_leaves_nothing(norm: str, size: float) -> None:
    delta, x, _ = draw(200, size, False, 0)
    found = NORMS[norm].project(delta, x, torch.zeros(len(x)))
    assert torch.equal(found, torch.zeros_like(x))
