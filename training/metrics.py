"""Loss, robust error and cost of an epoch, per norm, without synchronising with the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from utils.checkpoint import NonFiniteError

Model = Callable[[torch.Tensor], Any]


class NonFiniteGuard:
    """Raises NonFiniteError for a training step whose loss is not finite, with the names of the rows it came from."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def check(self, step: str, loss: float, losses: Sequence[float]) -> None:
        """step: its name in the error. loss: of the whole step. losses: the sum of each row."""
        if not math.isfinite(loss):
            odd = [name for name, one in zip(self.names, losses, strict=True) if not math.isfinite(one)]
            raise NonFiniteError(f"the loss of {step}{' (' + ', '.join(odd) + ')' if odd else ''} is {loss}")


@dataclass
class PassCounter:
    """Forward and backward passes in this process, counted in images."""

    forward: int = 0
    backward: int = 0

    def count(self, network: Model, trains: bool) -> Model:
        """The network with its calls counted: a backward pass is counted if it trains, or if the images require a gradient."""

        def counted(x: torch.Tensor) -> Any:
            self.forward += len(x)
            self.backward += len(x) * (trains or x.requires_grad)
            return network(x)

        return counted


def per_threat_sums(logits: torch.Tensor, y: torch.Tensor, threat: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums of cross-entropy, correct predictions and examples, for each threat: (rows, 3).

    logits (V, B, K), y (B,), threat (V, B) int64: the row that a version of an example counts for.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view_as(threat)
    correct = (logits.argmax(2) == y).to(losses.dtype)
    values = torch.stack([losses, correct, torch.ones_like(losses)], 2)
    mine = threat[..., None, None] == torch.arange(rows, device=threat.device)[:, None]
    return torch.where(mine, values[:, :, None], 0).sum((0, 1))  # `where`: another row's NaN must not spread


class EpochMetrics:
    """Sums of an epoch: a row per norm and one for clean images; examples, network passes, seconds."""

    def __init__(self, norms: Sequence[str]) -> None:
        self.norms, self.passes = list(norms), PassCounter()
        self.reset()

    def reset(self) -> None:
        """A new epoch."""
        self.sums = torch.zeros(len(self.norms) + 1, 3)
        self.examples = self.local_examples = self.passes.forward = self.passes.backward = 0
        self.passes_of_steps = dict(vars(self.passes))  # a signal may end an attack in the middle of a step
        self.start = time.time()

    def count_step(self, examples: int, local_examples: int) -> None:
        """Count a training step: its examples over all processes and in this one."""
        self.examples += examples
        self.local_examples += local_examples
        self.passes_of_steps = dict(vars(self.passes))

    def observe(self, table: torch.Tensor) -> None:
        """Add the `per_threat_sums` of a step, (norms + 1, 3) on the CPU."""
        self.sums += table

    def state_dict(self) -> dict[str, Any]:
        """Sums and seconds so far."""
        counts = {"sums": self.sums, "examples": self.examples, "local_examples": self.local_examples}
        return counts | self.passes_of_steps | {"seconds": time.time() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.sums, self.examples, self.local_examples = state["sums"], state["examples"], state["local_examples"]
        self.passes.forward, self.passes.backward = state["forward"], state["backward"]
        self.passes_of_steps = dict(vars(self.passes))
        self.start = time.time() - state["seconds"]

    def record(self, epoch: int, lr: float, running_errors: Sequence[float]) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl. A norm that was not sampled has null for loss and error.

        loss and error are means over the norm's adversarial examples, error in [0, 1]. drawn: the fraction of adversarial examples that
        count for the norm (sampled for it, or with MAX and MSD chosen). passes: forward and backward, per training image.
        """
        seconds = time.time() - self.start
        adversarial = float(self.sums[:-1, 2].sum())
        running: list[float | None] = [*running_errors, None]
        rows = {}
        for name, row, error in zip([*self.norms, "clean"], self.sums.tolist(), running, strict=True):
            drawn = None if name == "clean" else round(row[2] / adversarial, 4) if adversarial else 0.0
            if row[2] or name != "clean":
                rows[name] = {**_means(*row), "running_error": error, "drawn": drawn}
        total = _means(*(self.sums[:-1].sum(0) if adversarial else self.sums[-1]).tolist())
        passes = {name: round(number / max(self.local_examples, 1), 2) for name, number in vars(self.passes).items()}
        speed = {"seconds": round(seconds, 2), "images_per_second": round(self.examples / seconds, 1)}
        return {"epoch": epoch, "lr": lr, **total, "norms": rows, "passes": passes, **speed}


def _means(loss: float, correct: float, seen: float) -> dict[str, float | None]:
    if not seen:
        return {"loss": None, "error": None}
    return {"loss": round(loss / seen, 4), "error": round(1 - correct / seen, 4)}


HEADER = "each epoch: its last learning rate, then for each norm loss/error of its adversarial examples (- not sampled)"


def console_line(record: dict[str, Any], epochs: int) -> str:
    """The epoch in one line of at most 100 columns, as HEADER says; one more for each of its evaluations."""
    norms = "  ".join(
        f"{name} {row['loss']:.2f}/{100 * row['error']:.0f}%" if row["loss"] is not None else f"{name} -"
        for name, row in record["norms"].items()
    )
    lines = [f"epoch {record['epoch']}/{epochs}  lr {record['lr']:.3g}  {norms}  {record['seconds']:.1f} s"]
    for kind in ("eval", "eval_ema"):
        for split, rows in record.get(kind, {}).items():
            odd = {name: f" (NOT FINITE at {row['not_finite']})" for name, row in rows.items() if row.get("not_finite")}
            figures = "  ".join(
                f"{name} {row['accuracy']:.1f}{odd.get(name, '')}" for name, row in rows.items() if name != "average"
            )
            lines.append(f"    {split}{kind.removeprefix('eval')} accuracy, quick attacks: {figures}")
    return "\n".join(lines)


PATIENCE = 3  # epochs at chance before a run says so


def constant_loss(labels: torch.Tensor) -> float:
    """Cross-entropy of the best constant answer to labels (N,): the entropy of their frequencies."""
    frequencies = labels.bincount().double() / len(labels)
    return float(torch.special.entr(frequencies).sum())


def chance_warning(records: Sequence[Mapping[str, Any]], constant: float, epochs: int) -> str | None:
    """What to say after the last of the records, an epoch each, once in a run of `epochs`: training sits at chance.

    An epoch does if no norm's loss, nor the clean images', is below 98 % of `constant` (`constant_loss`). Said after three such epochs in
    a row, or after the last of a shorter run.
    """
    longest = streak = 0
    for record in records:
        before = longest
        losses = [row["loss"] for row in record["norms"].values() if row["loss"] is not None]
        streak = streak + 1 if losses and constant and min(losses) >= 0.98 * constant else 0
        longest = max(longest, streak)
    if not records or longest == before or longest != min(PATIENCE, epochs):
        return None
    return (
        f"WARNING: training sits at chance: for {longest} epochs the loss was not below that of a constant answer, "
        f"{constant:.2f}. The usual reasons: a learning rate too high or too low (--lr-max), radii that leave no class "
        "apart (--l_eps), labels that do not belong to the images"
    )


def best_networks(records: Sequence[Mapping[str, Any]], select: str | None) -> list[str]:
    """Suffixes ("", "_ema") of the networks whose accuracy `select` on --n_ex_val after the last of the records is above all before."""
    found = []
    for suffix in ("", "_ema") if select else ():
        values = [record.get(f"eval{suffix}", {}).get("val", {}).get(select, {}).get("accuracy") for record in records]
        if values[-1] is not None and all(value is None or value < values[-1] for value in values[:-1]):
            found.append(suffix)
    return found
