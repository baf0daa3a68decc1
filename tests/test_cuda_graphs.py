"""An attack as a CUDA graph gives what it gives call by call, with the weights of now, and counts the same passes.

Without a GPU a stand-in takes the graph's place: it writes down each operation of PyTorch with the memory that it reads and writes,
and a replay carries out the same operations on the same memory. What a graph forbids in addition, such as waiting for the device, is
seen on CUDA alone, by the tests marked gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attacks.multinorm import SCHEMES, make_scheme
from attacks.threat import Threat
from models import build_model
from training.cuda_graphs import SHAPES, GraphedAttack
from training.metrics import PassCounter
from utils.modules import eval_mode, no_param_grad
from utils.precision import autocast_model, cast_weights_once, check_amp

ON_CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


class WrittenDown(TorchDispatchMode):
    """Keeps each operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, found))
        return found


class Graph:
    """The stand-in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.operations:
                for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class Capture:
    """The stand-in for torch.cuda.graph."""

    def __init__(self, graph: Graph, capture_error_mode: str) -> None:
        self.graph, self.mode = graph, WrittenDown()

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self.graph.operations = self.mode.operations


@pytest.fixture(params=["stand-in", ON_CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "stand-in":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        yield torch.device("cpu")
    else:
        yield torch.device("cuda")


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet18", width=16).eval().to(device)


def batch(device: torch.device, seed: int, n: int = 8) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 3, 8, 8, generator=draws), torch.randint(0, 10, (n,), generator=draws)
    return x.to(device), y.to(device)


def close(a: Tensor, b: Tensor, amp: str) -> None:
    """Alike; in bf16 a few entries may step the other way."""
    apart = (a - b).abs()
    assert float((apart > 1e-4).float().mean()) < (0.02 if amp == "bf16" else 0.002), float(apart.max())


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_graph_gives_what_the_attack_gives(name: str, amp: Any, device: torch.device) -> None:
    model = network(device)
    plain = make_scheme(name, [Threat("Linf", 0.05), Threat("L1", 3.0)], [3, 3])
    graphed = make_scheme(name, [Threat("Linf", 0.05), Threat("L1", 3.0)], [3, 3])
    passes = [PassCounter(), PassCounter()]
    graphed.attacks[:] = [GraphedAttack(attack, model, passes[1]) for attack in graphed.attacks]
    forwards = [counter.count(autocast_model(model, device, amp), trains=False) for counter in passes]
    for step in range(6):  # the first two of each norm fill caches and record
        x, y = batch(device, step)
        sampled = graphed.draw(len(x), step, torch.Generator().manual_seed(step // 3))
        found = []
        for scheme, forward in zip((plain, graphed), forwards, strict=True):
            with eval_mode(model), cast_weights_once(device, amp) or no_param_grad(model):
                found.append(scheme.attack(forward, x, y, sampled))
        assert torch.equal(found[0].threat, found[1].threat)
        close(found[0].x, found[1].x, amp)
        assert vars(passes[0]) == vars(passes[1])
        with torch.no_grad():  # an update: the next replay must read the new weights
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert all(len(attack.recordings) == 1 for attack in graphed.attacks if attack.called)


def graphed_scale(model: nn.Module) -> tuple[GraphedAttack, Callable[[Tensor], Tensor]]:
    def attack(network: nn.Module, x: Tensor) -> Tensor:
        return network(x).sum(1)

    return GraphedAttack(attack, model, PassCounter()), model


def test_a_few_shapes_are_recorded_and_others_called(device: torch.device) -> None:
    model = nn.Linear(3, 4).to(device)
    graphed, _ = graphed_scale(model)
    with torch.no_grad():
        for n in (1, 2, 3, 4):
            for _ in range(3):
                x = torch.rand(n, 3, device=device)
                torch.testing.assert_close(graphed(model, x), model(x).sum(1))
    assert len(graphed.recordings) == SHAPES


def test_weights_that_move_in_memory_are_recorded_anew(device: torch.device) -> None:
    model = nn.Linear(3, 4).to(device)
    graphed, _ = graphed_scale(model)
    x = torch.rand(2, 3, device=device)
    with torch.no_grad():
        for _ in range(3):
            graphed(model, x)
        model.weight.data = torch.rand(4, 3, device=device)
        torch.testing.assert_close(graphed(model, x), model(x).sum(1))
        results = [graphed(model, x) for _ in range(2)]
        results[0].zero_()  # a result belongs to the caller
        torch.testing.assert_close(results[1], model(x).sum(1))


def test_an_attack_that_cannot_be_recorded_is_called(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda.graph, "__enter__", refuse)
    model = nn.Linear(3, 4).to(device)
    graphed, _ = graphed_scale(model)
    x = torch.rand(2, 3, device=device)
    with torch.no_grad():
        graphed(model, x)
        with pytest.warns(UserWarning, match="cannot be a CUDA graph.*capturing"):
            torch.testing.assert_close(graphed(model, x), model(x).sum(1))
        torch.testing.assert_close(graphed(model, x), model(x).sum(1))
    assert not graphed.recordings


def test_fp16_is_checked_before_a_graph(device: torch.device) -> None:
    check_amp(device, "bf16")
