"""The examples, the network whose robustness is measured, and what it says of them before any attack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .apgd import Model, check_logits, misclassified
from .checks import network_warnings


class NetworkError(ValueError):
    """The network failed on some examples, which the message names."""


@dataclass(frozen=True)
class Examples:
    """N images (N, C, H, W), uint8 from 0 to `levels` or floats in [0, 1] with levels 1, and labels (N,) int64, on the CPU."""

    images: Tensor
    y: Tensor
    levels: int = 1

    def __len__(self) -> int:
        return len(self.y)

    def x(self, index: Tensor) -> Tensor:
        """Images (B, C, H, W) as float32 in [0, 1]."""
        return self.images[index].float() / self.levels


@dataclass(frozen=True)
class Network:
    """The network whose robustness is measured, in eval mode on its device: x (B, C, H, W) in [0, 1] -> logits (B, K)."""

    model: Model
    device: torch.device
    batch_size: int = 250  # images at once
    attack_model: Model | None = None
    """Takes model's place in APGD, such as the same in bfloat16; `model` judges again what it breaks."""

    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """(B, K) float32 for images (B, ...) on the network's device, the examples `index` (B,). Raises NetworkError."""
        with torch.no_grad(), failures_of(index):
            answer = self.model(x.clone())  # a network may change its input in place
            check_logits(answer, len(x))
            return answer.float()

    def wrong(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """(B,) bool on the network's device: are images (B, ...) there not classified as y (B,)? Raises NetworkError."""
        return misclassified(self.logits(x, index), y.to(self.device, non_blocking=True))


@dataclass
class CleanAnswers:
    """What the network says of N clean images."""

    ranking: Tensor  # (N, K) int16: each example's classes by falling logit
    right: Tensor  # (N,) bool
    not_finite: Tensor  # (N,) bool: some logit is infinite or NaN
    warnings: list[str] = field(default_factory=list)


def clean_answers(network: Network, examples: Examples, index: Tensor) -> CleanAnswers:
    """Of the examples `index` (B,); the other rows are zeros. Raises NetworkError, and ValueError for labels that are no class."""
    n = len(examples)
    answers = CleanAnswers(torch.zeros(n, 0, dtype=torch.int16), *torch.zeros(2, n, dtype=torch.bool))
    for number, part in enumerate(index.split(network.batch_size)):
        x = examples.x(part).to(network.device)
        logits = network.logits(x, part).cpu()
        if number == 0:
            classes = logits.shape[1]
            if int(examples.y.min()) < 0 or int(examples.y.max()) >= classes:
                raise ValueError(f"labels must be from 0 to {classes - 1}, one of the network's classes")
            answers.ranking = torch.zeros(n, classes, dtype=torch.int16)
            if len(part):  # with more processes than examples, some have none
                with failures_of(part[:100]):
                    y = examples.y[part[:100]].to(network.device)
                    answers.warnings = network_warnings(network.model, x[:100], y)
        if logits.shape[1] != answers.ranking.shape[1]:
            raise NetworkError(f"{logits.shape[1]} logits for {named(part)}, {answers.ranking.shape[1]} for others")
        order = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True)
        answers.ranking[part] = order.to(torch.int16)
        answers.right[part] = ~misclassified(logits, examples.y[part])
        answers.not_finite[part] = ~logits.isfinite().all(1)
    return answers


@contextmanager
def failures_of(index: Tensor) -> Iterator[None]:
    """An exception inside becomes a NetworkError that names the examples `index`."""
    try:
        yield
    except NetworkError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise NetworkError(f"the network failed on {named(index)}: {type(error).__name__}: {reason}") from error


def named(index: Tensor | Sequence[int]) -> str:
    """Examples in words: ranges of their numbers, the first of them if there are many."""
    ordered, ranges = sorted(int(i) for i in index), list[list[int]]()
    for i in ordered:
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    told = [f"{first} to {last}" if last > first else str(first) for first, last in ranges[:10]]
    more = f" and more, {len(ordered)} in all" if len(ranges) > 10 else ""
    return f"{'images' if len(ordered) > 1 else 'image'} {', '.join(told)}{more}"
