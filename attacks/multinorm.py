"""Schemes of multi-norm training: which adversarial examples a training step sees, and with what loss.

A scheme is one class here: `draw` chooses what is random for the whole mini-batch, `attack` makes the adversarial examples of a
micro-batch, `loss` is the loss per example. `register` adds it to --multinorm, its options to the flags, and both to the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .apgd import Model, apgd, apgd_each, select_per_example
from .losses import cross_entropy
from .msd import msd
from .threat import Threat

# (model, x (B, ...), y (B,), more tensors ...) -> a tensor, a tuple or a dataclass of tensors
Attack = Callable[..., Any]


@dataclass(frozen=True)
class AdversarialBatch:
    """V versions of each of B examples, and the index of each one's threat model; len(threats) stands for the clean image."""

    x: Tensor  # (V, B, C, H, W) in [0, 1]
    threat: Tensor  # (V, B) int64

    @classmethod
    def clean(cls, x: Tensor, n_threats: int) -> AdversarialBatch:
        """The images x (B, C, H, W) as they are."""
        return cls(x[None], torch.full((1, len(x)), n_threats, device=x.device))


@dataclass(frozen=True)
class Option:
    """A number of at least 0 that a scheme takes; train.py has a flag of this name."""

    name: str
    help: str
    from_scratch: float  # default
    fine_tuning: float  # default


class Scheme:
    """Standard training on clean images; the base of all schemes, which override what differs.

    `threats` and `n_iters` (steps of each threat's attack) go together; `options` has a value for each of the class' options.
    Raises ValueError for threats or steps that the scheme does not take.
    """

    name: ClassVar[str] = "standard"
    summary: ClassVar[str] = "clean images"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L1")  # if --l_norms is left out
    options: ClassVar[tuple[Option, ...]] = ()
    same_n_iter: ClassVar[bool] = False  # one attack for all norms, with one number of steps
    single: ClassVar[bool] = True  # one adversarial example per image, so that TRADES' loss can be used
    label_smoothing: float = 0.0  # of the cross-entropies in `loss`

    def __init__(
        self, threats: Sequence[Threat], n_iters: Sequence[int] = (), options: Mapping[str, float] | None = None
    ) -> None:
        if self.same_n_iter and len(set(n_iters)) > 1:
            raise ValueError(
                f"{self.name} is one attack for all norms: give one number of steps for all, got {list(n_iters)}"
            )
        self.threats, self.n_iters = tuple(threats), tuple(n_iters)
        self.attacks = self.make_attacks()
        self.errors = RunningErrors(len(self.threats))

    def make_attacks(self) -> list[Attack]:
        """What `attack` calls, from self.attacks, where CUDA graphs take its place: no branch on data, no shape that depends on it.

        By default one APGD for each threat.
        """
        return [partial(apgd, threat=t, n_iter=n) for t, n in zip(self.threats, self.n_iters, strict=False)]

    def draw(self, n: int, step: int, generator: torch.Generator) -> Tensor:
        """Index of the threat sampled for each example of the whole mini-batch, n over all processes: (n,) int64 on the CPU.

        step: training steps done before this one. Must depend on the arguments and on `state_dict` alone.
        """
        return torch.zeros(n, dtype=torch.int64)

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """Adversarial examples of x (B, C, H, W) with labels y (B,), `sampled` (B,) as `draw` gave it. The model is in eval mode."""
        return AdversarialBatch.clean(x, len(self.threats))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each example (B,) from the logits (V, B, K) of its versions; the training step minimises the mean."""
        return cross_entropy(logits[0], y, self.label_smoothing)

    def observe(self, correct: Sequence[float], seen: Sequence[float]) -> None:
        """Counts of a training step, one per threat: its adversarial examples (`seen`) and those classified correctly (`correct`).

        Called once per step, in order, one step late: at `draw` the previous step is not in yet, so that no GPU has to be waited for.
        """
        self.errors.observe(correct, seen)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, as tensors, numbers and strings. A scheme with more state overrides it."""
        return self.errors.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.errors.load_state_dict(state)


class RunningErrors:
    """Running robust training error of each threat, 1 - correct / seen, from the first training step on (E-AT, arXiv 2105.12508)."""

    def __init__(self, n_threats: int) -> None:
        self.correct, self.seen = [0] * n_threats, [0] * n_threats

    def observe(self, correct: Sequence[float], seen: Sequence[float]) -> None:
        """Add a training step's counts."""
        self.correct = [total + int(new) for total, new in zip(self.correct, correct, strict=True)]
        self.seen = [total + int(new) for total, new in zip(self.seen, seen, strict=True)]

    def rates(self) -> list[float]:
        """Error of each threat; 1 where none was seen."""
        return [1 - c / s if s else 1.0 for c, s in zip(self.correct, self.seen, strict=True)]

    def probabilities(self) -> list[float]:
        """Sampling probability of each threat, proportional to its error; uniform until all were seen, and if all errors are 0."""
        rates = self.rates()
        if 0 in self.seen or sum(rates) == 0:
            return [1 / len(rates)] * len(rates)
        return [rate / sum(rates) for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"correct": list(self.correct), "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.correct, self.seen = list(state["correct"]), list(state["seen"])


SCHEMES: dict[str, type[Scheme]] = {}


def register(scheme: type[Scheme]) -> type[Scheme]:
    """Class decorator: makes the scheme a value of --multinorm, its options flags, and puts it into the tests of all schemes.

    Raises ValueError if another scheme has this name.
    """
    if SCHEMES.get(scheme.name, scheme).__qualname__ != scheme.__qualname__:
        raise ValueError(f"there is a scheme called {scheme.name!r} already")
    SCHEMES[scheme.name] = scheme
    return scheme


@register
class EAT(Scheme):
    """E-AT, extreme norm adversarial training (Croce & Hein, ICML 2022, arXiv 2105.12508, section 4): one norm per mini-batch."""

    name = "eat"
    summary = "samples one norm per batch with probability proportional to its running robust error"
    by_error: ClassVar[bool] = True
    per_example: ClassVar[bool] = False

    def draw(self, n: int, step: int, generator: torch.Generator) -> Tensor:
        """One threat for all n examples, or one for each."""
        weights = self.errors.probabilities() if self.by_error else [1.0] * len(self.threats)
        size = n if self.per_example else 1
        return torch.multinomial(torch.tensor(weights), size, replacement=True, generator=generator).expand(n)

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """APGD in the sampled threat: V = 1."""
        threat = sampled.to(x.device, non_blocking=True)
        x_adv = self.attacks[int(sampled[0])](model, x, y).x_best
        return AdversarialBatch(x_adv[None], threat[None])


@register
class UniformEAT(EAT):
    """E-AT that samples its norms uniformly."""

    name = "eat-uniform"
    summary = "samples one norm per batch uniformly"
    by_error = False


@register
class MixedEAT(EAT):
    """E-AT that samples a norm per example; each step of the attack is one pass for the examples of all norms."""

    name = "eat-mixed"
    summary = "samples one norm per example with probability proportional to its running robust error"
    per_example = True

    def make_attacks(self) -> list[Attack]:
        """One, of all threats together."""
        return [partial(apgd_each, attacks=[*zip(self.threats, self.n_iters, strict=False)])]

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """APGD in each example's sampled threat: V = 1."""
        threat = sampled.to(x.device, non_blocking=True)
        return AdversarialBatch(self.attacks[0](model, x, y, threat)[None], threat[None])


@register
class SAT(EAT):
    """SAT, stochastic adversarial training (Madaan et al., ICML 2021): one norm per mini-batch, sampled uniformly."""

    name = "sat"
    summary = "as eat-uniform, by default with all three norms"
    norms = ("Linf", "L2", "L1")
    by_error = False


@register
class Average(Scheme):
    """AVG (Tramèr & Boneh, NeurIPS 2019): the mean of the losses over the threats."""

    name = "avg"
    summary = "attacks every example in all norms and minimises the mean of the losses"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    single = False

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """One adversarial example per threat: V = number of threats."""
        x_adv = torch.stack([attack(model, x, y).x_best for attack in self.attacks])
        return AdversarialBatch(x_adv, torch.arange(len(x_adv), device=x.device)[:, None].expand(-1, len(x)))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over the threats."""
        return self.cross_entropies(logits, y).mean(0)

    def cross_entropies(self, logits: Tensor, y: Tensor) -> Tensor:
        """Of each version: (V, B, K), (B,) -> (V, B)."""
        flat = cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), self.label_smoothing)
        return flat.view(logits.shape[:2])


@register
class Maximum(Scheme):
    """MAX (Tramèr & Boneh, NeurIPS 2019): for each example the threat whose attack found the highest loss."""

    name = "max"
    summary = "attacks every example in all norms and trains on the one of highest loss"
    norms = ("Linf", "L2", "L1")

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """Of the threats' adversarial examples that of highest loss: V = 1."""
        found = [attack(model, x, y) for attack in self.attacks]
        worst = torch.stack([each.loss for each in found]).argmax(0)
        return AdversarialBatch(select_per_example([each.x_best for each in found], worst)[None], worst[None])


@register
class MultiSteepestDescent(Scheme):
    """MSD (Maini et al., ICML 2020, arXiv 1909.04068): one attack; each step tries every norm's and keeps the one of highest loss."""

    name = "msd"
    summary = "one attack that takes at each step the norm of highest loss"
    norms = ("Linf", "L2", "L1")
    same_n_iter = True

    def make_attacks(self) -> list[Attack]:
        """One, of all threats together."""
        return [partial(msd, threats=self.threats, n_iter=n) for n in self.n_iters[:1]]

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """MSD's adversarial examples, each counted for the threat whose step led to it."""
        x_adv, threat = self.attacks[0](model, x, y)
        return AdversarialBatch(x_adv[None], threat[None])


@register
class RAMP(Average):
    """RAMP's loss (Jiang & Singh, NeurIPS 2024, arXiv 2402.06827): max of the two threats' cross-entropies + lambda KL(p_q || p_r).

    q and r are the first and the second threat; the KL term (logit pairing) is the mean over the examples classified correctly under q.
    """

    name = "ramp"
    summary = "attacks every example in two norms and minimises the higher loss plus logit pairing, a KL divergence between the two"
    norms = Scheme.norms
    options = (Option("ramp_lambda", "weight of ramp's logit pairing", from_scratch=2.0, fine_tuning=0.5),)

    def __init__(
        self, threats: Sequence[Threat], n_iters: Sequence[int] = (), options: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(threats, n_iters, options)
        if len(threats) != 2:
            raise ValueError(f"ramp is for two norms, such as 'Linf L1', got {len(threats)}")
        self.weight = (options or {}).get("ramp_lambda", self.options[0].from_scratch)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss (B,). The KL term is averaged over the micro-batch of this process, not over the whole mini-batch."""
        q, r = logits
        correct = (q.argmax(1) == y).float()
        scale = len(y) / correct.sum().clamp(min=1)
        return self.cross_entropies(logits, y).amax(0) + self.weight * correct * _kl(q, r) * scale


class Trades(Scheme):
    """TRADES' loss (Zhang et al., ICML 2019), CE(clean) + beta KL(p_clean || p_adv), on another scheme's adversarial examples.

    The attack is that scheme's and maximises cross-entropy, not the KL divergence as published.
    """

    name = "trades"

    def __init__(self, scheme: Scheme, beta: float) -> None:
        super().__init__(scheme.threats)
        self.scheme, self.beta, self.errors, self.attacks = scheme, beta, scheme.errors, scheme.attacks
        self.draw, self.observe = scheme.draw, scheme.observe  # type: ignore[method-assign]
        self.state_dict, self.load_state_dict = scheme.state_dict, scheme.load_state_dict  # type: ignore[method-assign]

    def attack(self, model: Model, x: Tensor, y: Tensor, sampled: Tensor) -> AdversarialBatch:
        """The clean images, then the adversarial examples."""
        both = AdversarialBatch.clean(x, len(self.threats)), self.scheme.attack(model, x, y, sampled)
        return AdversarialBatch(torch.cat([batch.x for batch in both]), torch.cat([batch.threat for batch in both]))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the clean image plus beta times the KL divergence."""
        clean, adversarial = logits
        return cross_entropy(clean, y, self.label_smoothing) + self.beta * _kl(clean, adversarial)


def make_scheme(
    name: str,
    threats: Sequence[Threat],
    n_iters: Sequence[int],
    options: Mapping[str, float] | None = None,
    trades_beta: float | None = None,
) -> Scheme:
    """The registered scheme `name`, with TRADES' loss in place of cross-entropy if trades_beta is given. Raises ValueError."""
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; choose one of {' '.join(SCHEMES)}")
    scheme = SCHEMES[name](threats, n_iters, options)
    if trades_beta is None:
        return scheme
    if not scheme.single:
        raise ValueError(
            f"{name} has a loss of its own; trades goes with the schemes that make one adversarial example per image"
        )
    return Trades(scheme, trades_beta)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of logits (B, K): (B,)."""
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="none", log_target=True).sum(1)
