"""Ways of training for several norms: which adversarial points of a batch an update sees, and with what loss.

A scheme draws what it needs for the whole batch, makes the points of a part of it, and says each image's loss. A new one is a class here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.modules import AsyncScalars

from .apgd import Model, apgd, apgd_each, select_per_example
from .losses import cross_entropy
from .msd import msd
from .threat import Threat

SCHEMES = {
    "eat": "one norm for each batch, drawn by running error",
    "eat-uniform": "one norm for each batch, drawn evenly",
    "eat-mixed": "one norm for each image, drawn by running error",
    "sat": "one norm for each batch, drawn evenly",
    "avg": "the mean of the losses in all norms",
    "max": "for each image the norm of highest loss",
    "msd": "one run whose every step is that of the norm of highest loss",
    "ramp": "the highest loss of two norms, and the second one's logits paired to the first one's",
}
ALL_NORMS = ("sat", "avg", "max", "msd")  # as published: with L2 too


@dataclass(frozen=True)
class AdversarialBatch:
    """What an update sees of B images: V views of each, and for each view whose ball it is in (number of threats: the clean image)."""

    x: Tensor  # (V, B, C, H, W)
    threat: Tensor  # (V, B) int64


def clean_batch(x: Tensor, clean: int) -> AdversarialBatch:
    """The images (B, C, H, W) themselves, as threat number `clean`."""
    return AdversarialBatch(x[None], torch.full((1, len(x)), clean, device=x.device))


class Scheme:
    """Standard training: the clean images. Base of all others, which say otherwise where they differ."""

    def __init__(self, threats: Sequence[Threat], n_iters: Sequence[int] = ()) -> None:
        self.threats = tuple(threats)
        self.attacks = [partial(apgd, threat=t, n_iter=n) for t, n in zip(threats, n_iters, strict=False)]
        self.errors = RunningErrors(len(threats))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """For each of a batch's n images, of all processes, the threat that is drawn for it: (n,) int64 on the CPU."""
        return torch.zeros(n, dtype=torch.int64)

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        """The views of x (B, C, H, W), y (B,), of which drawn (B,) is what `draw` said. The model is in eval mode."""
        return clean_batch(x, len(self.threats))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Each image's loss (B,) of the logits (V, B, K) at its views. An update descends on its mean."""
        return cross_entropy(logits[0], y)


class SampledNorm(Scheme):
    """One attack an update, in a threat that is drawn for the batch, or for each of its images.

    By running error: E-AT (arXiv 2105.12508, section 4). Evenly: SAT where all three norms are given (Madaan et al., ICML 2021).
    """

    def __init__(self, threats: Sequence[Threat], n_iters: Sequence[int], by_error: bool, each: bool) -> None:
        super().__init__(threats, n_iters)
        self.n_iters, self.by_error, self.each = n_iters, by_error, each

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        chances = self.errors.chances() if self.by_error else [1.0] * len(self.threats)
        drawn = torch.multinomial(torch.tensor(chances), n if self.each else 1, replacement=True, generator=generator)
        return drawn.expand(n)

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        which = drawn.to(x.device, non_blocking=True)
        if self.each:
            return AdversarialBatch(apgd_each(model, x, y, self.threats, self.n_iters, which)[None], which[None])
        return AdversarialBatch(self.attacks[int(drawn[0])](model, x, y).x_best[None], which[None])


class Average(Scheme):
    """AVG: the mean of the losses at the points of all threats (Tramèr & Boneh, NeurIPS 2019)."""

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        found = torch.stack([attack(model, x, y).x_best for attack in self.attacks])
        return AdversarialBatch(found, torch.arange(len(found), device=x.device)[:, None].expand(-1, len(x)))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return _cross_entropies(logits, y).mean(0)


class Maximum(Scheme):
    """MAX: of each image the point of highest loss over the threats (Tramèr & Boneh, NeurIPS 2019), as the attacks found it."""

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        found = [attack(model, x, y) for attack in self.attacks]
        worst = torch.stack([each.loss for each in found]).argmax(0)
        return AdversarialBatch(select_per_example([each.x_best for each in found], worst)[None], worst[None])


class MultiSteepestDescent(Scheme):
    """MSD: one run whose every step is the threats' step of highest loss (Maini et al., ICML 2020)."""

    def __init__(self, threats: Sequence[Threat], n_iters: Sequence[int]) -> None:
        super().__init__(threats, n_iters)
        self.n_iter = n_iters[0]

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        x_adv, threat = msd(model, x, y, self.threats, self.n_iter)
        return AdversarialBatch(x_adv[None], threat[None])


class Ramp(Average):
    """RAMP's logit pairing (Jiang & Singh, NeurIPS 2024, arXiv 2402.06827): max of the losses at the points of two threats, q and r,

    plus lambda times KL(p_q, p_r), the mean over the images that are right under q: there r's softmax is pulled to q's.
    """

    def __init__(self, threats: Sequence[Threat], n_iters: Sequence[int], weight: float) -> None:
        super().__init__(threats, n_iters)
        self.weight = weight

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Images that are wrong under q have no KL, the others len(y) / their number times it, so that the mean is over them.

        It is over this part of a batch: a process' share, or a piece of it.
        """
        q, r = logits
        right = (q.argmax(1) == y).float()
        return _cross_entropies(logits, y).amax(0) + self.weight * right * _kl(q, r) * (
            len(y) / right.sum().clamp(min=1)
        )


class Trades(Scheme):
    """TRADES' outer loss (Zhang et al., ICML 2019): clean cross-entropy plus beta KL(p_clean, p_adversarial) at another scheme's points."""

    def __init__(self, scheme: Scheme, beta: float) -> None:
        super().__init__(scheme.threats)
        self.scheme, self.beta, self.errors = scheme, beta, scheme.errors

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.scheme.draw(n, generator)

    def points(self, model: Model, x: Tensor, y: Tensor, drawn: Tensor) -> AdversarialBatch:
        parts = clean_batch(x, len(self.threats)), self.scheme.points(model, x, y, drawn)
        return AdversarialBatch(torch.cat([part.x for part in parts]), torch.cat([part.threat for part in parts]))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        clean, adversarial = logits
        return cross_entropy(clean, y) + self.beta * _kl(clean, adversarial)


def make_scheme(
    name: str,
    threats: Sequence[Threat],
    n_iters: Sequence[int],
    ramp_lambda: float = 2.0,
    trades_beta: float | None = None,
) -> Scheme:
    """The scheme called `name`; trades_beta, if given, puts TRADES' loss in the place of cross-entropy. Raises ValueError."""
    scheme: Scheme
    match name:
        case "eat" | "eat-uniform" | "eat-mixed" | "sat":
            scheme = SampledNorm(threats, n_iters, by_error=name in ("eat", "eat-mixed"), each=name == "eat-mixed")
        case "avg":
            scheme = Average(threats, n_iters)
        case "max":
            scheme = Maximum(threats, n_iters)
        case "msd":
            if len(set(n_iters)) > 1:
                raise ValueError(f"msd makes one run for all norms, with one number of steps, got {list(n_iters)}")
            scheme = MultiSteepestDescent(threats, n_iters)
        case "ramp":
            if len(threats) != 2:
                raise ValueError(f"ramp is for two norms, such as 'Linf L1', got {len(threats)}")
            scheme = Ramp(threats, n_iters, ramp_lambda)
        case _:
            raise ValueError(f"unknown scheme {name!r}; choose one of {' '.join(SCHEMES)}")
    if trades_beta is None:
        return scheme
    if isinstance(scheme, Average):
        raise ValueError(
            f"{name} has a loss of its own; trades goes with the schemes that make one adversarial point an image"
        )
    return Trades(scheme, trades_beta)


class RunningErrors:
    """Each threat's training error, 1 - right / seen under attack, counted over the whole run.

    What is drawn by it knows all updates but the last one, so that no device has to finish that before the next is prepared.
    """

    def __init__(self, number: int) -> None:
        self.right, self.seen = [0] * number, [0] * number
        self._coming: deque[AsyncScalars] = deque()  # updates not counted yet

    def all(self) -> list[float]:
        """After all updates; 1 where a threat was not met yet. Waits for the device."""
        self._count()
        return self._errors()

    def chances(self) -> list[float]:
        """Each threat's to be drawn, after all updates but the last: even until each was met (and if none errs), then by error."""
        self._count(all_but=1)
        errors = self._errors()
        if 0 in self.seen or sum(errors) == 0:
            return [1 / len(errors)] * len(errors)
        return [error / sum(errors) for error in errors]

    def observe(self, counts: Tensor) -> None:
        """An update's outcome: for each threat how many points were right under attack, of how many, (number, 2)."""
        self._coming.append(AsyncScalars(counts))

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the updates not counted yet. Waits for the device."""
        return {"right": list(self.right), "seen": list(self.seen), "coming": [c.numbers() for c in self._coming]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the next draw knows what it would have known."""
        self.right, self.seen = list(state["right"]), list(state["seen"])
        self._coming = deque(AsyncScalars(torch.tensor(counts)) for counts in state["coming"])

    def _count(self, all_but: int = 0) -> None:
        while len(self._coming) > all_but:
            for index, (right, seen) in enumerate(self._coming.popleft().numbers()):
                self.right[index] += int(right)
                self.seen[index] += int(seen)

    def _errors(self) -> list[float]:
        return [1 - right / seen if seen else 1.0 for right, seen in zip(self.right, self.seen, strict=True)]


def _cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """(V, B, K), (B,) -> (V, B)."""
    return cross_entropy(logits.flatten(0, 1), y.repeat(len(logits))).view(logits.shape[:2])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p), softmax(q)) of logits (B, K): (B,)."""
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="none", log_target=True).sum(1)
