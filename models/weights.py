"""Weights in files that others wrote: found by names and shapes, wherever they lie and whatever stands before their names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]
USUAL = ("", "state_dict", "model_state_dict", "model", "net", "last", "best")  # where weights lie, in this order
UNUSED = "sub_block1."  # many published wide residual networks have a block beside block1 that no pass goes through
MOST_PARTS, MOST_PREFIXES, DEEPEST_PREFIX = 10_000, 300, 6  # that are looked at; words before a layer's name
MEANS, STDS = ("mean", "mu", "means"), ("std", "sigma", "sd", "stds")  # what buffers of normalising layers are called
MOST_WEIGHTS = 3 * 10**9  # of a network: training needs 16 bytes for each
COUNTER = "num_batches_tracked"  # PyTorch before 0.4.1 did not count BatchNorm's batches, and nothing here asks for the number


@dataclass(frozen=True)
class Weights:
    """A state dict in a file: the keys that lead to it, joined by dots (empty: the file itself)."""

    place: str
    state: StateDict
    others: tuple[str, ...] = ()  # names of the tensors beside it, under other prefixes


def weights_in(content: Any, word: str | None = None) -> list[Weights]:
    """Every mapping with tensors in what a file holds, the usual ones first, those of EMA after others.

    word: of the name under which it is stored, such as ema; others are left out. Raises ValueError if there is none.
    """
    found, queue, seen = [], deque([("", content)]), set[int]()
    while queue and len(seen) < MOST_PARTS:
        place, part = queue.popleft()
        if not isinstance(part, Mapping) or id(part) in seen:  # some files hold themselves
            continue
        seen.add(id(part))
        inner = [(key, value) for key, value in part.items() if isinstance(key, str)]
        if state := {key: value for key, value in inner if isinstance(value, Tensor) and value.layout == torch.strided}:
            found.append(Weights(place, state))
        queue.extend((f"{place}.{key}".lstrip("."), value) for key, value in inner)
    if not found:
        raise ValueError("it holds no state dict (tensors by name, plain or under 'state_dict' or 'model')")
    return sorted(found if word is None else _under(word, found), key=_rank)  # stable: in the order of the file


def _under(word: str, found: list[Weights]) -> list[Weights]:
    """Those stored under a name with this word. Raises ValueError if there are none."""
    chosen = [each for each in found if word.lower() in each.place.lower()]
    if not chosen:
        places = ", ".join(repr(each.place) for each in found)
        raise ValueError(f"no weights in it are stored under a name with {word!r}; there are {places}")
    return chosen


def prefixes(weights: Weights) -> Iterator[Weights]:
    """The same without any prefix, then without each that stands before some of the names, the shortest first."""
    heads = {""}
    for name in weights.state:
        parts = name.split(".")[:DEEPEST_PREFIX]
        heads |= {".".join(parts[:n]) + "." for n in range(1, len(parts))}
    for head in sorted(heads, key=lambda head: (head.count("."), head))[:MOST_PREFIXES]:
        state = {name.removeprefix(head): each for name, each in weights.state.items() if name.startswith(head)}
        yield Weights(weights.place, state, tuple(name for name in weights.state if not name.startswith(head)))


def match(model: nn.Module, found: list[Weights]) -> tuple[Weights, list[str]]:
    """The first weights with the network's names and shapes, and the places of all that have. Raises ValueError if none has."""
    own = model.state_dict()
    fitting: list[Weights] = []
    least: tuple[int, str] = (len(own) + 1, "")
    for weights in found:
        for each in prefixes(weights):
            odd = different(own, each.state)
            least = min(least, (len(odd), odd[0] if odd else ""))
            if not odd:
                fitting.append(each)
                break
    if not fitting:
        differ = f"{least[0]} of {len(own)} names or shapes differ, the first {least[1]}"
        raise ValueError(f"it is a checkpoint of another network: {differ}")
    return fitting[0], [each.place for each in fitting]


def normalization_in(state: StateDict) -> tuple[StateDict, tuple[list[float], list[float]] | None]:
    """The state without the buffers of a layer that normalises the input, and their mean and std; None if it has no such pair."""
    for name, mean in state.items():
        head, dot, last = name.rpartition(".")
        stds = [f"{head}{dot}{each}" for each in STDS if f"{head}{dot}{each}" in state]
        if last in MEANS and stds and mean.numel() == state[stds[0]].numel() <= 4 and mean.is_floating_point():
            rest = {key: each for key, each in state.items() if key not in (name, stds[0])}
            return rest, (mean.flatten().tolist(), state[stds[0]].flatten().tolist())
    return state, None


def different(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of a network's state and another has, or with other shapes; counters and unused blocks apart."""
    shapes, expected = (
        {name: each.shape for name, each in both.items() if not (name.endswith(COUNTER) or name.startswith(UNUSED))}
        for both in (state, own)
    )
    return sorted({name for name, _ in shapes.items() ^ expected.items()})


def load_weights(model: nn.Module, state: StateDict) -> None:
    """Put the state into the network. Raises ValueError unless names and shapes are the same."""
    own = model.state_dict()
    if odd := different(own, state):
        raise ValueError(
            f"it is a checkpoint of another network: {len(odd)} names or shapes differ, the first {odd[0]}"
        )
    counters = {name: each for name, each in own.items() if name.endswith(COUNTER)}
    model.load_state_dict({name: each for name, each in (counters | state).items() if name in own})


def check_size(state: StateDict) -> None:
    """Raises ValueError for more weights than any network has: a small file can say that it holds any number."""
    if sum(each.numel() for each in state.values()) > MOST_WEIGHTS:
        raise ValueError(f"it says that it holds more than {MOST_WEIGHTS:.0e} weights")


def _rank(weights: Weights) -> tuple[bool, int]:
    last = weights.place.rpartition(".")[2]
    return "ema" in weights.place.lower(), USUAL.index(last) if last in USUAL else len(USUAL)
