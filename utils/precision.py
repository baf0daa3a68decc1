"""Numeric precision (autocast, TF32), CPU threads and memory."""

from __future__ import annotations

import copy
import ctypes
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from utils.distributed import print_on_rank0

Amp = Literal["off", "bf16", "fp16"]
AMPS: tuple[Amp, ...] = get_args(Amp)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_model(model: Callable[[Tensor], Tensor], device: torch.device, amp: Amp) -> Callable[[Tensor], Tensor]:
    """The network under autocast to that format: float32 images in, logits of that format out."""
    if amp == "off":
        return model

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPES[amp]):
            return model(x)

    return forward


def with_cast_weights(model: nn.Module, amp: Amp) -> nn.Module:
    """A copy whose convolutions and linear layers have their weights in that format: autocast casts those without gradient in each pass."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(DTYPES[amp])
    return model


def cast_weights_once(device: torch.device, amp: Amp) -> torch.autocast | None:
    """A context inside which `autocast_model` casts each weight once for all passes, and not in each one; None where that does not help.

    Autocast keeps the casts of weights that require a gradient until its outermost context ends.
    """
    return None if amp == "off" or device.type == "cpu" else torch.autocast(device.type, DTYPES[amp])


def compiled_network(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """torch.compile's of the model: a graph for each batch size, so that full batches keep theirs after a partial one."""
    # Batch sizes, train and eval mode, with and without gradient: more than the eight after which torch stops compiling.
    torch._dynamo.config.recompile_limit = 64
    # Said of images that an attack hands over as copies, since networks may change them in place.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor")
    network: nn.Module = torch.compile(model, dynamic=False, backend=backend)  # type: ignore[assignment]
    return network


def check_amp(device: torch.device, amp: Amp) -> None:
    """Raises ValueError if the device does not take the format; warns if it has no instructions for it."""
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"fp16 is for CUDA devices; on {device.type} take bf16")
    if amp == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        print_on_rank0(
            "WARNING: this processor has no bfloat16 instructions, --amp=bf16 is many times slower; leave it out"
        )


def cpu_has_bf16() -> bool:
    """Does the processor have bfloat16 instructions that PyTorch uses? Without them a pass took 11 times as long as in float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):  # ATEN_CPU_CAPABILITY can lower it
            return False
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_up_torch(threads: int | None, tf32: bool) -> None:
    """Keep freed memory, set CPU threads (None: PyTorch's choice); with tf32 also allow TF32 and cudnn.benchmark on NVIDIA GPUs."""
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = tf32


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next tensors, where the C library is glibc; elsewhere nothing happens.

    As it comes, glibc returns large tensors to the system at once, which has to clear their pages for each new one: a fifth of a
    pass on CPUs (docs/log.md).
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, no TF32 and no cudnn.benchmark, so that figures do not depend on the batch size; afterwards as before."""
    before = torch.backends.cudnn.allow_tf32
    set_up_torch(None, tf32=False)
    try:
        yield
    finally:
        set_up_torch(None, tf32=before)
