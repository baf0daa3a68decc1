"""A device in Python on which every kernel runs on a CPU tensor inside, and that answers as a GPU would without one.

Tensors of two devices in one kernel are refused, as CUDA refuses them (a CPU tensor without dimensions passes, as there). What makes the
host wait for CUDA is noted in `log.events`, as (kind, operation, FILE:LINE of the project, mark):

    read    a value goes to the host: .item(), bool(), .tolist(), .cpu(), equal
    shape   a kernel whose result's shape depends on data: nonzero, masked_select, an index of booleans
    h2d     a copy from the host that waits, or an index that lies on the host

`log.ops` counts kernels. It is torch's PrivateUse1 backend and a wrapper subclass; import this before any tensor is made, in a process of
its own, and call `as_cuda` before the project is imported. It lacks in-place changes of a tensor's shape, NCCL, streams and CUDA graphs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npy"
WAITS = ("read", "shape", "h2d")
aten = torch.ops.aten


class Event:
    """What the project asks of torch.cuda.Event."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Module:
    """What torch asks of torch.npy, and the project of torch.cuda."""

    Event = Event

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        log.add("read", "synchronize")

    def set_device(self, device: object) -> None:
        pass

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return 2**36, 2**36

    def get_device_name(self, device: object = None) -> str:
        return "strict"

    def current_stream(self, device: object = None) -> None:
        return None

    def get_rng_state(self, device: object = 0) -> torch.Tensor:
        return torch.empty(0)

    def set_rng_state(self, state: torch.Tensor, device: object = 0) -> None:
        pass


class Log:
    """What happened, and in which line of the project under `root`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str, str]] = []
        self.ops: Counter[str] = Counter()
        self.root, self.mark = "", ""

    def add(self, kind: str, op: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if self.root and frame.filename.startswith(self.root)]
        own = [frame for frame in frames if not {".venv", "tests"} & {*Path(frame.filename).parts}]
        place = f"{Path(own[-1].filename).relative_to(self.root)}:{own[-1].lineno}" if own else "?"
        self.events.append((kind, op, place, self.mark))

    def clear(self) -> None:
        self.events.clear()
        self.ops.clear()


log, PINNED = Log(), []
_setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)
torch.__future__.set_overwrite_module_params_on_conversion(True)  # `parameter.data = ...` would leave `raw` behind


class Strict(torch.Tensor):
    """A tensor of the device; `raw` is the CPU tensor inside."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Strict:
        assert type(raw) is torch.Tensor
        assert raw.device.type == "cpu"
        about = {"storage_offset": raw.storage_offset(), "dtype": raw.dtype, "layout": raw.layout, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), **about)

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Strict({self.raw!r})"

    def __reduce_ex__(
        self, protocol: Any
    ) -> Any:  # a file holds the numbers; where they go says map_location, here always the CPU
        log.add("read", "save")
        return self.raw.detach().clone().__reduce_ex__(protocol)


# Kernels that take no CPU tensor without dimensions either.
LISTS = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.gather.default}
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "repeat_interleave", "nonzero_numpy"}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "is_same_size"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """A kernel, on the tensors inside."""
    log.ops[str(func)] += 1
    flat, spec = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    to_host = noted(func, args, kwargs, tensors)
    raw = [each.raw if isinstance(each, Strict) else each for each in flat]
    raw = [torch.device("cpu") if isinstance(v, torch.device) and v.type == NAME else v for v in raw]
    raw_args, raw_kwargs = tree_unflatten(raw, spec)
    out = func(*raw_args, **raw_kwargs)
    if (given := written(func, args, kwargs)) is not None:
        return given
    return out if to_host else tree_map(lambda t: Strict(t) if type(t) is torch.Tensor else t, out)


def noted(func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor]) -> bool:
    """Note what waits, and refuse tensors of two devices; is the result on the host?"""
    name, asked = func.overloadpacket.__name__, kwargs.get("device")
    strict = any(isinstance(each, Strict) for each in tensors)
    to_host = (asked is not None and torch.device(asked).type == "cpu") or (not strict and asked is None)
    if func is aten._to_copy.default:
        if to_host and not kwargs.get("non_blocking"):
            log.add("read", "to cpu")
        return to_host
    if func is aten.copy_.default:
        return copied(*args[:2], waits=not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    if name in READS:
        log.add("read", name)
        return True
    if name in INDEXING:
        indexed(func, args, tensors)
        return to_host
    if name in SHAPES:
        log.add("shape", name)
    same_device(func, tensors)
    return to_host


def copied(target: torch.Tensor, source: torch.Tensor, waits: bool) -> bool:
    """Note a copy; is the result on the host?"""
    if isinstance(source, Strict) and not isinstance(target, Strict):
        if waits or not any(pinned() is target for pinned in PINNED[-64:]):
            log.add("read", "copy_ to cpu")
        return True
    if waits and isinstance(target, Strict) and not isinstance(source, Strict):
        log.add("h2d", "copy_ from cpu")
    return False


def indexed(func: Any, args: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Note indices that wait."""
    indices = [each for each in tree_flatten(args[1])[0] if isinstance(each, torch.Tensor)]
    for index in indices:
        if index.dtype in (torch.bool, torch.uint8):
            log.add("shape", "index with booleans")
        if not isinstance(index, Strict):
            log.add("h2d", "index on the host")
    if not isinstance(args[0], Strict):
        raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    same_device(func, [each for each in tensors if not any(each is index for index in indices)])


def same_device(func: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError for a kernel that is given a CPU tensor beside the device's."""
    if any(isinstance(each, Strict) for each in tensors):
        for each in tensors:
            if not isinstance(each, Strict) and (each.dim() > 0 or func in LISTS):
                raise RuntimeError(f"{func}: all tensors must be on the same device, found {DEVICE} and cpu")


def written(func: Any, args: Any, kwargs: Any) -> Any:
    """What a kernel wrote in place is the tensor that it was given; None for another kernel."""
    returned = func._schema.returns
    if not returned or any(each.alias_info is None or not each.alias_info.is_write for each in returned):
        return None
    given = {}
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for label in argument.alias_info.after_set | argument.alias_info.before_set:
                given[label] = args[number] if number < len(args) else kwargs.get(argument.name)
    found = tuple(given[next(iter(each.alias_info.before_set))] for each in returned)
    return found[0] if len(found) == 1 else found


@torch.library.impl("aten::empty.memory_format", "privateuseone")
def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, memory_format: Any = None
) -> Strict:  # fmt: skip
    return Strict(torch.empty(size, dtype=dtype, memory_format=memory_format))


@torch.library.impl("aten::empty_strided", "privateuseone")
def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Strict:
    return Strict(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "privateuseone")
def _copy_from(source: torch.Tensor, target: Any, non_blocking: bool = False) -> Any:
    """torch.tensor(..., device=DEVICE) comes here, past the subclass."""
    log.add("h2d", "torch.tensor")
    target.raw.copy_(source.raw if isinstance(source, Strict) else source)
    return target


# Composite ones would give an empty tensor its size later, which a wrapper can't follow.
@torch.library.impl("aten::arange", "privateuseone")
def _arange(end: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Strict:
    return Strict(torch.arange(end, dtype=dtype))


@torch.library.impl("aten::arange.start", "privateuseone")
def _arange_start(
    start: Any, end: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Strict:
    return Strict(torch.arange(start, end, dtype=dtype))


@torch.library.impl("aten::arange.start_step", "privateuseone")
def _arange_step(
    start: Any, end: Any, step: Any = 1, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Strict:  # fmt: skip
    return Strict(torch.arange(start, end, step, dtype=dtype))


def _autocast(name: str, dtype: torch.dtype | None) -> None:
    """An operation under autocast: in that type (None: the low one), as CUDA's lists have it."""
    packet, overload = name.split(".") if "." in name else (name, "default")
    op = getattr(getattr(aten, packet), overload)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        to = dtype or torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            floating = isinstance(value, Strict) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(to) if floating else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    torch.library.impl(f"aten::{name}", "AutocastPrivateUse1")(kernel)


_rest = torch.library.Library("_", "IMPL")
_rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in ("conv2d", "linear", "matmul", "mm", "addmm", "bmm"):
    _autocast(_name, None)
for _name in (
    "softplus",
    "exp",
    "log",
    "rsqrt",
    "nll_loss",
    "kl_div",
    "cosine_similarity",
):  # and others that nothing here calls
    _autocast(_name, torch.float32)


def as_cuda(root: str) -> None:
    """Modules in `root` that are imported from now on take this device for CUDA, and pinned memory is known."""
    empty = torch.empty

    def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        if pin_memory:
            PINNED.append(weakref.ref(made))
        return made

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname: str) -> Any:
            source = Path(self.path).read_text()
            for old, new in (('"cuda"', f'"{NAME}"'), ("torch.cuda.", f"torch.{NAME}."), (".is_cuda", f".is_{NAME}")):
                source = source.replace(old, new)
            return compile(source, self.path, "exec", dont_inherit=True)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            place = Path(root).joinpath(*name.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            loader = Loader(name, str(file))
            return importlib.util.spec_from_file_location(name, file, loader=loader) if file.is_file() else None

    torch.empty = pinning  # type: ignore[assignment]
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
    log.root = root
