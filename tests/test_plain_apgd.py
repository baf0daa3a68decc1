"""The attack against a plain one in float64: an example at a time, sorting projections, no shared code."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.norms import NORMS
from attacks.threat import Threat
from data import DATASETS, load_dataset

Array = NDArray[np.float64]


def smallest_scale(norms: Array, radius: float, at: Array) -> float:
    """Where a falling piecewise linear function with values `norms` at the sorted places `at` meets the radius."""
    k = int(np.argmax(norms <= radius))
    share = (norms[k - 1] - radius) / (norms[k - 1] - norms[k])
    return float(at[k - 1] + share * (at[k] - at[k - 1]))


def project(delta: Array, x: Array, norm: str, eps: float) -> Array:
    """Nearest point of ball and box: for L1 by its breakpoints in order, for L2 by bisection of the multiplier."""
    size, room = np.abs(delta), np.where(delta > 0, 1 - x, x)
    if norm == "Linf":
        return np.sign(delta) * np.minimum(np.minimum(size, eps), room)
    if norm == "L1":
        if np.minimum(size, room).sum() <= eps:
            return np.sign(delta) * np.minimum(size, room)
        at = np.unique(np.concatenate([[0.0], size, np.maximum(size - room, 0)]))
        norms = np.minimum(np.maximum(size - at[:, None], 0), room).sum(1)
        threshold = smallest_scale(norms, eps, at)
        left = np.minimum(np.maximum(size - threshold, 0), room)
        return np.sign(delta) * np.where(left > 1e-12, left, 0)  # an entry right at the threshold is 0: L1 counts those
    low, high = 0.0, 1.0
    if np.linalg.norm(np.minimum(size, room)) <= eps:
        low = 1.0
    for _ in range(100 * (low < 1)):
        middle = (low + high) / 2
        if np.linalg.norm(np.minimum(middle * size, room)) <= eps:
            low = middle
        else:
            high = middle
    return np.sign(delta) * np.minimum(low * size, room)


def direction(grad: Array, norm: str, keep: float) -> Array:
    """Of steepest ascent; for L1 the signs of the largest entries."""
    if norm == "Linf":
        return np.sign(grad)
    if norm == "L2":
        return grad / np.linalg.norm(grad)
    rank = min(max(int(np.ceil(keep)), 1), len(grad))
    signs = np.where(np.abs(grad) >= np.sort(np.abs(grad))[-rank], np.sign(grad), 0)
    return signs / np.count_nonzero(signs)


def plain_apgd(model: nn.Module, image: Tensor, label: int, norm: str, eps: float, n_iter: int) -> float:
    """Highest loss of one example (1, C, H, W), from the clean point (arXiv 2003.01690, algorithm 1; 2103.01208, algorithm 1)."""
    x = image.double().flatten().numpy()

    def loss_and_grad(delta: Array) -> tuple[float, Array]:
        point = torch.from_numpy(x + delta).view(image.shape).requires_grad_(True)
        loss = nn.functional.cross_entropy(model(point), torch.tensor([label]))
        return loss.item(), torch.autograd.grad(loss, point)[0].flatten().numpy()

    delta = previous = best = np.zeros_like(x)
    value, grad = loss_and_grad(delta)
    best_value, best_grad, value_at_check = value, grad, value
    step, keep, nonzeros = (eps, 0.05 * len(x), float(len(x))) if norm == "L1" else (2 * eps, 0.0, 0.0)
    halved, rises, since = True, 0, 0
    interval, shorter, shortest = (max(int(part * n_iter), 1) for part in (0.22, 0.03, 0.06))
    if norm == "L1":
        interval = shortest = max(int(0.04 * n_iter), 1)
    for k in range(n_iter):
        new = project(delta + step * direction(grad, norm, keep), x, norm, eps)
        if norm != "L1" and k > 0:
            new = project(delta + 0.75 * (new - delta) + 0.25 * (delta - previous), x, norm, eps)
        previous, delta = delta, new
        last, (value, grad) = value, loss_and_grad(delta)
        rises, since = rises + (value > last), since + 1
        if value > best_value:
            best, best_value, best_grad = delta, value, grad
        if since < interval:
            continue
        if norm == "L1":
            count = float(np.count_nonzero(best))
            back = count < 0.95 * nonzeros
            step, keep, nonzeros = eps if back else max(step / 1.5, eps / 10), count / 1.5, count
        else:
            back = rises <= 0.75 * since or (not halved and best_value <= value_at_check)
            step, halved, value_at_check = step / 2 if back else step, back, best_value
        if back:
            delta, value, grad = best, best_value, best_grad
        interval, rises, since = max(interval - shorter, shortest), 0, 0
    return best_value


@pytest.mark.parametrize("n_iter", [10, 40])
@pytest.mark.parametrize("norm", NORMS)
def test_the_attack_finds_the_losses_of_the_plain_one(norm: str, n_iter: int, trained: nn.Module) -> None:
    x, y = load_dataset("digits", "").test.take(24).pixels()
    eps = DATASETS["digits"].radii[norm]
    exact = copy.deepcopy(trained).double()
    plain = [plain_apgd(exact, x[i : i + 1], int(y[i]), norm, eps, n_iter) for i in range(len(y))]
    ours = apgd(trained, x, y, Threat(norm, eps), n_iter).loss
    torch.testing.assert_close(ours.double(), torch.tensor(plain, dtype=torch.float64), rtol=1e-4, atol=1e-4)
