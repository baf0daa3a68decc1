"""Attacks as CUDA graphs: the kernels of a whole attack are recorded once, then launched together, with no Python in between.

An attack has static shapes and no branch on data, so that its launches are always the same. One by one they cost the host more time
than they cost the GPU: an attack of ten steps on a small network has thousands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from training.metrics import PassCounter

Attack = Callable[..., Any]  # (model, tensors ...) -> a tensor, a tuple or a dataclass of tensors
SHAPES = 2  # recorded of each attack: a full mini-batch, and the last one of an epoch or one more micro-batch


class GraphedAttack:
    """The attack, which from its second call with tensors of the same shapes on replays what was recorded there.

    `network`: whose weights the attack reads. They may change in place; if their memory moves, the attack is recorded anew. `passes`
    counts a replay's passes as if they were calls. An attack that cannot be recorded is called as it is, with one warning.
    """

    def __init__(self, attack: Attack, network: nn.Module, passes: PassCounter) -> None:
        self.attack, self.network, self.passes = attack, network, passes
        self.called: set[Any] = set()
        self.recordings: dict[Any, Recording] = {}
        self.can_record = True

    def __call__(self, model: Callable[[Tensor], Tensor], *tensors: Tensor) -> Any:
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        recording = self.recordings.get(key)
        if recording is None or recording.weights != addresses(self.network):
            # The first call fills what a recording may not: tables on the device, cuDNN's choice of algorithms, compiled code.
            if not self.can_record or key not in self.called:
                self.called.add(key)
                return self.attack(model, *tensors)
            if recording is None and len(self.recordings) == SHAPES:
                return self.attack(model, *tensors)
            try:
                recording = self.recordings[key] = Recording(self, model, tensors)
            except RuntimeError as error:
                self.can_record = False
                reason = str(error).split("\n")[0]
                warnings.warn(
                    f"the attack cannot be a CUDA graph with this network, and is slower: {reason}", stacklevel=2
                )
                return self.attack(model, *tensors)
        return recording.replay(tensors)


class Recording:
    """One attack with one set of shapes, on tensors of its own."""

    def __init__(self, graphed: GraphedAttack, model: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...]) -> None:
        self.passes, self.weights = graphed.passes, addresses(graphed.network)
        self.inputs = [tensor.clone() for tensor in tensors]
        self.graph = torch.cuda.CUDAGraph()
        before = self.passes.forward, self.passes.backward
        torch.clear_autocast_cache()  # weights have to be cast in the recording
        try:
            # Other threads, such as those that load images or watch NCCL, may go on meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = graphed.attack(model, *self.inputs)
            self.counts = self.passes.forward - before[0], self.passes.backward - before[1]
        finally:
            self.passes.forward, self.passes.backward = before  # recording computes nothing
            torch.clear_autocast_cache()  # these casts have no values yet

    def replay(self, tensors: tuple[Tensor, ...]) -> Any:
        """The attack's result on these tensors."""
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        self.passes.forward += self.counts[0]
        self.passes.backward += self.counts[1]
        return map_tensors(torch.clone, self.result)  # the next replay writes to the same memory


def addresses(network: nn.Module) -> list[int]:
    """Where the network's parameters and buffers are."""
    return [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The tensor, or the tuple or dataclass of tensors, with the function applied to each."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: map_tensors(function, getattr(value, field.name)) for field in fields(value)}
        )
    return tuple(map_tensors(function, each) for each in value)
