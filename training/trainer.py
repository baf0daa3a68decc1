"""Trainer: a run's model, scheme, optimizer, metrics and training state. The loop over its batches is in train.py."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.multinorm import AdversarialBatch, Scheme
from config import TrainConfig, scheme_of
from data import BatchLoader, Dataset, mix, on_device
from models import Spec
from training.awp import AdversarialWeights
from training.cuda_graphs import GraphedAttack
from training.gradient_projection import GradientProjection
from training.metrics import EpochMetrics, NonFiniteGuard
from training.optim import EMA, forget_backbone, make_optimizer
from utils.checkpoint import CheckpointManager, Stateful
from utils.distributed import (
    Process,
    all_reduce_sum,
    average_buffers,
    data_parallel,
    no_sync_unless,
    run_on_rank0,
    sync_batchnorm,
)
from utils.modules import AsyncScalars, eval_mode, generator, no_param_grad
from utils.precision import autocast_model, cast_weights_once, compiled_network
from utils.resume import run_id
from utils.schedules import lr_schedule
from utils.signals import Interrupted, Signals

Phase = tuple[Scheme, torch.optim.Optimizer]
MicroBatches = list[tuple[AdversarialBatch, Tensor]]  # adversarial examples and labels


@dataclass(frozen=True)
class Batch:
    """This process' part of a mini-batch."""

    index: int  # in its pass over the data, from 0
    x: Tensor  # (B, C, H, W) in [0, 1]
    y: Tensor  # (B,)
    size: int  # of the whole mini-batch, over all processes


class Trainer:
    """State of a training run. `epoch` and `step` count what is done: the next training step is number `step` of epoch `epoch`, from 0.

    `attack_model` is the model as the attack calls it, `train_model` as the training step calls it (data-parallel); both are
    under autocast and count their passes.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, network: tuple[nn.Module, Spec], process: Process, signals: Signals
    ) -> None:
        device, (model, spec) = process.device, network
        self.config, self.dataset, self.process, self.signals = config, dataset, process, signals
        self.model = sync_batchnorm(model, device) if config.sync_bn else model
        self.scheme = scheme_of(config)
        data = on_device(training_data(config, dataset), device)
        rank = process.rank, process.world_size
        self.loader = BatchLoader(data, config.batch_size, config.seed, device, *rank, config.workers)
        self.batches_per_pass = len(self.loader)
        self.lr_at = lr_schedule(config.lr_schedule or "", config.lr_max or 0.0, config.warmup / (config.epochs or 1))
        self.head: str | None = spec.get("head")  # the name of a new last layer
        self.optimizer = make_optimizer(config, self.model, self.head)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = EMA(self.model, config.ema) if config.ema else None
        self.awp = AdversarialWeights(self.model, config.awp) if config.awp else None
        self.projection = None
        if config.gradient_projection:
            self.projection = GradientProjection(self.model, make_optimizer(config, self.model, self.head))
        self.metrics = EpochMetrics([threat.norm for threat in self.scheme.threats])
        self.guard = NonFiniteGuard([*map(str, self.scheme.threats), "clean"])
        self._wrap_model()
        self.about: dict[str, Any] = {"spec": spec, "dataset": config.dataset}
        self.about["threats"] = {threat.norm: threat.eps for threat in self.scheme.threats}
        self.about |= {"image_size": config.image_size} if config.image_size else {}
        self.epoch = self.step = 0
        # A step's sums are read one step later, so that the host never waits for the GPU; E-AT's probabilities lag by that step.
        self._pending: deque[tuple[str, AsyncScalars]] = deque()
        self._stop = False  # was a process asked to end?

    def _wrap_model(self) -> None:
        """Around the model: compilation, data parallelism, autocast, counters."""
        config, device = self.config, self.process.device
        compiled = compiled_network(self.model) if config.compile else self.model
        parallel = data_parallel(compiled, device)
        self.attack_model = self.metrics.passes.count(autocast_model(compiled, device, config.amp), trains=False)
        self.train_model = self.metrics.passes.count(autocast_model(parallel, device, config.amp), trains=True)
        self.no_sync_unless = partial(no_sync_unless, model=parallel)
        self.radius_scale = torch.ones((), device=device)
        if config.eps_warmup:
            self.scheme.attacks[:] = [partial(attack, radius_scale=self.radius_scale) for attack in self.scheme.attacks]
        if device.type == "cuda" and not config.no_cuda_graphs:
            graphed = [GraphedAttack(attack, self.model, self.metrics.passes) for attack in self.scheme.attacks]
            self.scheme.attacks[:] = graphed

    def store_in(self, folder: Path) -> None:
        """Set the run's folder, where training states and checkpoints go."""
        parts: dict[str, Stateful] = {"optimizer": self.optimizer, "scaler": self.scaler, "metrics": self.metrics}
        parts |= {"scheme": self.scheme}
        parts |= {"ema": self.ema} if self.ema else {}
        parts |= {"projection": self.projection} if self.projection else {}
        self.folder = folder
        self.checkpoints = CheckpointManager(
            folder,
            self.model,
            self.about | {"run": run_on_rank0(lambda: run_id(folder))},
            parts,
            60 * self.config.save_every,
            self.process.is_rank0,
        )

    @property
    def frozen(self) -> bool:
        """Is the new last layer trained alone in this epoch?"""
        return self.epoch < self.config.freeze_epochs

    def train_mode(self) -> None:
        """Set it; a frozen backbone stays in eval mode, with its BatchNorm statistics, and starts without momentum after that."""
        self.model.train(not self.frozen)
        if self.frozen:
            self.model.get_submodule(self.head or "").train()
        elif self.config.freeze_epochs == self.epoch and self.step == 0:
            forget_backbone(self.optimizer)

    @property
    def phases_per_epoch(self) -> int:
        """Passes over the data in an epoch."""
        return 2 if self.projection else 1

    def phases(self) -> Iterator[Phase]:
        """Scheme and optimizer of each remaining pass over the data of this epoch."""
        if self.step == self.phases_per_epoch * self.batches_per_pass:
            return  # resumed from a state saved after the epoch's last step, before its evaluation
        standard = Scheme(self.scheme.threats)
        standard.label_smoothing = self.config.label_smoothing
        if not self.projection:
            yield standard if self.epoch < self.config.init_epochs else self.scheme, self.optimizer
            return
        natural, adversarial = (standard, self.projection.optimizer), (self.scheme, self.optimizer)
        yield from self.projection.halves(natural, adversarial, natural_done=self.step >= self.batches_per_pass)

    def batches(self) -> Iterator[Batch]:
        """The remaining mini-batches of this pass over the data, this process' part of each. Raises ValueError for a damaged image file."""
        first = self.step % self.batches_per_pass
        bar = tqdm(
            self.loader.epoch(self.epoch, first),
            total=self.batches_per_pass,
            initial=first,
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            leave=False,
            disable=None if self.process.is_rank0 else True,
        )
        for index, (x, y) in enumerate(bar, start=first):
            yield Batch(index, x, y, self.loader.num_examples(index))

    def adversarial_micro_batches(self, scheme: Scheme, batch: Batch) -> MicroBatches:
        """The scheme's adversarial examples, in micro-batches; the model in eval mode, no parameter gradients. Raises Interrupted."""
        rank, world_size = self.process.rank, self.process.world_size
        if self.config.eps_warmup:
            # In place: a CUDA graph reads it where it is. At the end of a step, so that no radius is 0.
            self.radius_scale.fill_(min(self.progress(batch.index + 1) / self.config.eps_warmup, 1.0))
        epoch_steps = self.phases_per_epoch * self.batches_per_pass
        draws = generator(self.config.seed, self.epoch, self.step)
        sampled = scheme.draw(batch.size, self.epoch * epoch_steps + self.step, draws).tensor_split(world_size)[rank]
        number = min(self.config.accumulate, max(batch.size // (2 * world_size), 1))
        parts = zip(*(part.tensor_split(number) for part in (batch.x, batch.y, sampled)), strict=True)
        # A signal may end the attack at once where no other process waits for this one.
        at_once = self.signals.at_once() if world_size == 1 else nullcontext()
        low_precision = cast_weights_once(self.process.device, self.config.amp)
        with eval_mode(self.model), low_precision or no_param_grad(self.model), at_once:
            return [(scheme.attack(self.attack_model, x, y, sampled), y) for x, y, sampled in parts]

    def progress(self, batch: int) -> float:
        """Fraction of training done before the batch of this number, in [0, 1), for the learning-rate schedule."""
        done = self.epoch * self.batches_per_pass + batch
        return done / ((self.config.epochs or 1) * self.batches_per_pass)

    def before_step(self) -> None:
        """Process the sums of all steps but the last, save the state when due, seed PyTorch. Raises what `save` does, Interrupted."""
        self._collect(all_but=1)
        if self.process.world_size == 1:
            self.signals.check()
        elif self._stop:  # all processes know it after the same step
            raise Interrupted(self.signals.received or signal.SIGTERM)
        if self.checkpoints.due():
            self.save()
        # What dropout, stochastic depth and the like draw: of this step alone, so that resuming needs no saved state.
        torch.manual_seed(generator(self.config.seed, self.epoch, self.step, self.process.rank).initial_seed())

    def after_step(self, sums: Tensor, batch: Batch) -> None:
        """After the optimizer step: average BatchNorm's buffers over processes, update the EMA, copy `sums` to the host without waiting."""
        if not self.config.sync_bn:
            average_buffers(self.model)
        if self.ema:
            self.ema.update(self.model)
        stop = torch.full((1,), float(self.signals.received is not None), device=sums.device)
        outcome = AsyncScalars(all_reduce_sum(torch.cat([sums, stop])))
        self._pending.append((f"batch {batch.index + 1} of epoch {self.epoch + 1}", outcome))
        self.metrics.count_step(batch.size, len(batch.x))
        self.step += 1

    def _collect(self, all_but: int = 0) -> None:
        """Process the sums of all pending steps but the last `all_but`; waits for the device if they are not on the host yet."""
        while len(self._pending) > all_but:
            step, scalars = self._pending.popleft()
            loss, *table, stop = scalars.numbers()
            rows = torch.tensor(table).view(-1, 3)
            self.guard.check(step, loss, rows[:, 0].tolist())
            self._stop |= stop > 0
            self.metrics.observe(rows)
            self.scheme.observe(rows[:-1, 1].tolist(), rows[:-1, 2].tolist())

    def epoch_record(self) -> dict[str, Any]:
        """The epoch's record for metrics.jsonl, as EpochMetrics.record gives it. Raises NonFiniteError."""
        self._collect()
        *_, group = [
            each for each in self.optimizer.param_groups if not each.get("constant_lr")
        ]  # the first may be frozen
        lr = group["lr"] / group.get("lr_factor", 1.0)
        return self.metrics.record(self.epoch + 1, lr, self.scheme.errors.rates())

    def next_epoch(self) -> None:
        """Start the next epoch: reset step and metrics, save the state. Raises NonFiniteError, OSError."""
        self.epoch, self.step = self.epoch + 1, 0
        self.metrics.reset()
        self.save()

    def save(self) -> None:
        """Save the training state, once all steps are known to be finite. Raises NonFiniteError, OSError."""
        pending = []
        for step, scalars in self._pending:
            loss, *table, _ = scalars.numbers()
            self.guard.check(step, loss, table[::3])
            pending.append((step, [loss, *table, 0.0]))  # whoever resumes was not asked to stop
        self.checkpoints.save(self.epoch, self.step, {"pending": pending})

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self.checkpoints.restore(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self._pending = deque((step, AsyncScalars(torch.tensor(numbers))) for step, numbers in state["pending"])

    def networks(self) -> dict[str, nn.Module]:
        """The trained network and, with --ema, the averaged one, by the suffix of their files."""
        return {"": self.model} | ({"_ema": self.ema.module} if self.ema else {})


def training_data(config: TrainConfig, dataset: Dataset) -> Any:
    """The first --n_ex_train training images, mixed with --extra_data if given."""
    return mix(
        dataset.train.take(config.n_ex_train or 0), dataset.extra, config.batch_size, config.extra_fraction or 0.0
    )
