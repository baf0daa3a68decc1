"""Several processes of one program, as torchrun starts them; alone, every function does what one process needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.cli import UsageError
from utils.text import printable

T = TypeVar("T")

STARTING = timedelta(minutes=2)  # in which all processes have to be there
MEETING = timedelta(minutes=30)  # in which all have to come to the same collective operation
_STORE: list[Any] = []  # of the process group, while there is one
_PLACES = count()  # where processes wait for all


@dataclass(frozen=True)
class Process:
    """One of the `world_size` processes that torchrun started, and its device; alone it is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_rank0(self) -> bool:
        """Does this process write and print?"""
        return self.rank == 0


ALONE = Process(torch.device("cpu"))


@contextmanager
def process_group(device: torch.device) -> Iterator[Process]:
    """This process, joined to the others by NCCL for CUDA and gloo otherwise where torchrun started it.

    Raises UsageError if the environment is not torchrun's, or if a process is missing after two minutes.
    """
    missing = [name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and os.environ.get("WORLD_SIZE", "1") == "1":  # some schedulers set it for a single process too
        yield Process(device)
        return
    if missing:
        advice = "start the program with torchrun, or unset WORLD_SIZE to run one process"
        raise UsageError("WORLD_SIZE", f"the environment has it without {', '.join(missing)}; {advice}")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=STARTING))  # type: ignore[attr-defined]
        # Before any collective operation, whose timeout has to be longer: one that died while it started would stay hidden.
        store.set(f"started/{rank}", "")
        store.wait([f"started/{other}" for other in range(world_size)], STARTING)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        number = os.environ["WORLD_SIZE"]
        raise UsageError(
            "WORLD_SIZE", f"not all of the {number} processes started within {STARTING.seconds} s"
        ) from error
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=MEETING)
    _STORE.append(store)
    yield Process(device, rank, world_size)
    # Not after an exception: it would wait for what the others still do, and hide that this process is dead.
    with suppress(dist.DistError):  # whoever holds the store may be gone
        # A process that closes its connections while another still reads the last result would make that one fail.
        store.set(f"finished/{rank}", "")
        store.wait([f"finished/{other}" for other in range(world_size)], STARTING)
    _STORE.clear()
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device named; `auto` is CUDA if there, else MPS, else the CPU. Raises ValueError if the machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise ValueError(f"this machine has no device {name!r}; --device=auto takes what there is")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def local_device(device: torch.device) -> torch.device:
    """This process' own GPU, where torchrun started several on a machine. Raises ValueError if one is named, or there are too few."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    rank, several = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    if device.index is not None:
        if several:
            raise ValueError(f"{device} for all of torchrun's processes: with --device=cuda each has a GPU of its own")
        return device
    count = torch.cuda.device_count()
    if count == 1:  # the launcher lets each process see its own alone
        rank = 0
    if rank >= count:
        raise ValueError(f"process {rank} of this machine has no GPU, {count} are visible: --nproc_per_node={count}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call the function on rank 0 and return its result on all ranks; its ValueError or OSError is one on all ranks."""
    if not dist.is_initialized():
        return function()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[1] = (OSError if isinstance(error, OSError) else ValueError)(str(error))
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    value: T = box[0]
    return value


def print_on_rank0(*lines: str) -> None:
    """Print the lines, if this is rank 0; before there is a process group, too."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(printable(line, 1000), flush=True)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def wait_for_all() -> None:
    """Wait for all processes, however long they take: a collective operation would end after `MEETING`."""
    if not _STORE:
        return
    place = f"place{next(_PLACES)}"
    _STORE[0].set(f"{place}/{dist.get_rank()}", "")
    while not _STORE[0].check([f"{place}/{rank}" for rank in range(dist.get_world_size())]):
        time.sleep(0.05)


def all_gather(value: T) -> list[T]:
    """Every process' value, any that pickle takes, by rank; waits however long that takes."""
    if not dist.is_initialized():
        return [value]
    wait_for_all()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model to call in training steps: its gradients are the mean over the processes. Buffers are left to `average_buffers`."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync_unless(last: bool, model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, gradients of a `data_parallel` model are not reduced over the processes, unless it is the last micro-batch."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def average_buffers(model: nn.Module) -> None:
    """Set each floating buffer (BatchNorm's statistics) to its mean over the processes, so that all have the same network."""
    if not dist.is_initialized():
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:
        flat = all_reduce_sum(torch.cat([buffer.flatten() for buffer in buffers])) / dist.get_world_size()
        means = flat.split([buffer.numel() for buffer in buffers])
        shaped = [mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)]
        torch._foreach_copy_(buffers, shaped)  # one launch


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with each BatchNorm's statistics taken over the examples of all processes; its state dict keeps its names."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if isinstance(model, _BatchNorm):
        shared = SyncBatchNorm(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
        like = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
        shared = shared.to(like.device, like.dtype)
        shared.load_state_dict(model.state_dict())
        return shared.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, sync_batchnorm(child, device))
    return model


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the examples of all processes on devices without torch.nn.SyncBatchNorm, which needs CUDA."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(B, C, ...) -> the same shape."""
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        across, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        count = all_reduce_sum(torch.tensor(x.numel() // x.shape[1], device=x.device, dtype=x.dtype))
        mean = _AllReduceSum.apply(x.sum(across)) / count
        apart = x - mean.view(shape)
        variance = _AllReduceSum.apply(apart.square().sum(across)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), share)
        out = apart * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


class _AllReduceSum(torch.autograd.Function):
    """The sum over the processes, and of its gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone())
