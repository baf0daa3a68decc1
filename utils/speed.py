"""What passes cost: number formats, threads, and how a network is called in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Amp = Literal["off", "bf16", "fp16"]
AMPS: tuple[Amp, ...] = get_args(Amp)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_format(model: Callable[[Tensor], Tensor], device: torch.device, amp: Amp) -> Callable[[Tensor], Tensor]:
    """The network with its forward passes under autocast in that format: float32 images in, logits of that format out."""
    if amp == "off":
        return model

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPES[amp]):
            return model(x)

    return forward


def check_format(device: torch.device, amp: Amp) -> None:
    """Raises ValueError if the device does not take the format."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"fp16 is for CUDA devices; on {device.type} take bf16")


def set_up(threads: int | None, tf32: bool) -> None:
    """Number of CPU threads (None: PyTorch's choice); on NVIDIA cards TF32, and convolutions chosen by trial, which suits fixed shapes."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = tf32


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 as it is inside, where figures are measured in batches of any size; TF32 again after, if it was on."""
    before = torch.backends.cudnn.allow_tf32
    set_up(None, tf32=False)
    try:
        yield
    finally:
        set_up(None, tf32=before)
