"""A network from a file of weights: what the file says of itself, what names and shapes tell, and what has to be assumed."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.heads import replace_head
from models.libraries import library_spec, num_classes_in, split_library
from models.networks import NETWORKS, Spec, StateDict, build_known, find_network
from models.normalization import Normalized, Statistic, normalized, statistics
from models.own_function import build_own_function, split_own_function
from models.robustbench_zoo import robustbench_spec
from models.weights import Weights, check_size, different, load_weights, match, normalization_in, prefixes, weights_in
from utils.checkpoint import load_tensors

LARGEST = 4096  # height and width of images, in pixels


@dataclass(frozen=True)
class NetworkFlags:
    """What flags say of a network whose file may not tell it; None: nothing."""

    arch: str | None = None
    act: str | None = None  # activation
    mean: Statistic = None  # of the input normalisation
    std: Statistic = None
    weights: str | None = None  # a word of the name under which they are stored in the file
    shape: tuple[int, int, int] | None = None  # (C, H, W) of the images; None: the network's own


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, how to rebuild it, and what its checkpoint says of itself (empty for other files)."""

    model: nn.Module
    spec: Spec
    about: dict[str, Any]
    notes: tuple[str, ...] = ()  # what was assumed, a line each


def from_file(
    path: Path,
    dataset: str,
    flags: NetworkFlags = NetworkFlags(),
    maker: str | None = None,
) -> Loaded:
    """The network of a file; `maker`: what makes it, FILE.py:FUNCTION, called as the checkpoint's spec says, or LIBRARY:NAME."""
    content = load_tensors(path)
    found, spec = weights_in(content, flags.weights), _spec_in(content)
    for weights in found:
        check_size(weights.state)
    if split_library(maker or ""):
        if not spec:
            return _of_library(path, maker or "", found, flags)
        if spec.get("arch") != maker:
            raise ValueError(f"its network is {spec.get('arch')}, not {maker}")
    elif maker:
        told = spec if spec.get("arch") == "function" else normalization_of(flags)
        spec = told | {"arch": "function", "function": maker}
    elif spec.get("arch") == "function":
        own = spec["function"]
        raise ValueError(f"its network comes from {own}; name both: --model_name='{own}@{path}'")
    elif not spec:
        return _plain(path, found, dataset, flags)
    _check_told(spec, flags)
    return replace(_matched(path, spec, found, maker), about=_about(content))


def _check_told(spec: Spec, flags: NetworkFlags) -> None:
    """Raises ValueError if flags say something else of a network than its checkpoint does."""
    if flags.arch and flags.arch != spec.get("arch"):
        raise ValueError(f"its network is {spec.get('arch')}; leave --arch={flags.arch} out")
    for key, value in {"act": flags.act, **normalization_of(flags)}.items():
        if value not in (None, spec.get(key)):
            said = f"with --{key}={spec[key]}" if key in spec else f"without --{key}"
            raise ValueError(f"it was trained {said}, leave that flag out")


def _of_library(path: Path, arch: str, found: list[Weights], flags: NetworkFlags) -> Loaded:
    """LIBRARY:NAME with weights that say nothing of themselves, normalised as the flags or the library say. Raises ValueError."""
    spec = library_spec(
        arch, num_classes_in(found[0].state, arch), *flags.shape[:2] if flags.shape else ()
    ) | normalization_of(flags)
    model = _built(spec, None)
    inner = model.model if isinstance(model, Normalized) else model
    weights, places = match(inner, found)
    load_weights(inner, weights.state)
    return Loaded(
        model,
        spec,
        {},
        (f"{path} holds weights alone: {_normalization(spec)} (--mean, --std)", *_several(path, places)),
    )


def _matched(path: Path, spec: Spec, found: list[Weights], function: str | None = None) -> Loaded:
    """The network of a spec, with the first weights in the file that have its names and shapes. Raises ValueError."""
    model = _built(spec, function)
    weights, places = match(model, found)
    load_weights(model, weights.state)
    return Loaded(model, spec, {}, _several(path, places))


def _spec_in(content: Any) -> Spec:
    found = content.get("spec") if isinstance(content, dict) else None
    return dict(found) if isinstance(found, dict) and all(isinstance(key, str) for key in found) else {}


def _about(content: Any) -> dict[str, Any]:
    """What a checkpoint says of itself, as far as it is of the right type: others write other things there."""
    said = content if isinstance(content, dict) else {}
    kinds = {"dataset": str, "image_size": int, "epoch": int, "threats": list}
    about = {key: said[key] for key, kind in kinds.items() if isinstance(said.get(key), kind)}
    return {key: value for key, value in about.items() if key != "image_size" or 1 <= value <= LARGEST}


def _plain(path: Path, found: list[Weights], dataset: str, flags: NetworkFlags) -> Loaded:
    """The network of weights that say nothing of themselves: names and shapes tell which of ours and its sizes.

    A run of the authors' may tell by its name the activation or, unless --arch does, a network of RobustBench's (`act=...`, `fts=RB_...`).
    """
    told = dict(re.findall(r"(act|fts)=([\w.-]+)", f"{path.parent.name} {path.name}"))
    if not flags.arch and told.get("fts", "").startswith("RB_"):
        spec = robustbench_spec(told["fts"], dataset)
        return _matched(path, spec | {"threat": spec["threat"] or "Linf"}, found)
    known = [each for weights in found for each in _recognized(weights)]
    if not known:
        raise ValueError(
            f"it is a checkpoint of another network than {' and '.join(NETWORKS)}; take RobustBench's as RB_{{id}}, "
            "build others with FILE.py:FUNCTION@CHECKPOINT"
        )
    fitting = [each for each in known if not different(_shapes(each.spec), each.weights.state)] or known[:1]
    spec = _completed(fitting[0], flags, told)
    model = _built(spec, None)
    load_weights(model.model if isinstance(model, Normalized) else model, fitting[0].weights.state)
    return Loaded(
        model,
        spec,
        {},
        (*_assumed(path, spec, fitting[0].weights), *_several(path, [each.weights.place for each in fitting])),
    )


@dataclass(frozen=True)
class Recognized:
    """Weights without what stands before their names, the network of ours that they are of, and the input normalisation among them."""

    weights: Weights
    spec: Spec
    normalization: tuple[list[float], list[float]] | None


def _completed(found: Recognized, flags: NetworkFlags, told: dict[str, str]) -> Spec:
    """Its spec, with activation and normalisation by the flags, the file's name, the file, or the network's own. Raises ValueError."""
    network = find_network(found.spec["arch"])
    assert network is not None
    spec = found.spec | {"act": flags.act or told.get("act") or network.act}
    if flags.arch and flags.arch != spec["arch"]:
        raise ValueError(f"its network is {spec['arch']}; leave --arch={flags.arch} out")
    mean, std = found.normalization or (None, None)
    return spec | (normalization_of(flags) or normalization_of(NetworkFlags(mean=mean, std=std)))


def _assumed(path: Path, spec: Spec, weights: Weights) -> list[str]:
    """What to say of weights alone."""
    network = find_network(spec["arch"])
    assert network is not None
    title = network.title or network.name
    notes = [
        f"{path} holds weights alone: taken for a {title}, {spec['act']}, {_normalization(spec)} (--act, --mean, --std)"
    ]
    if weights.others:
        notes.append(f"{path}: left out are {', '.join(weights.others[:5])}{' ...' * (len(weights.others) > 5)}")
    return notes


def _normalization(spec: Spec) -> str:
    """The input normalisation of a spec, in words."""
    mean, std = (" ".join(f"{value:.4g}" for value in spec.get(key, ())) for key in ("mean", "std"))
    return f"input normalisation with mean {mean} and std {std}" if mean else "no input normalisation"


def _recognized(weights: Weights) -> list[Recognized]:
    """The network of ours that the weights are of, at most one."""
    state, pair = normalization_in(weights.state)
    for each in prefixes(replace(weights, state=state)):
        for network in NETWORKS.values():
            with suppress(ValueError, IndexError, TypeError):  # names of ours with other shapes
                if spec := network.recognise(each.state):
                    return [Recognized(each, dict(spec), pair)]
    return []


def _several(path: Path, places: list[str]) -> tuple[str, ...]:
    """What to say where several weights in a file fit."""
    if len(places) < 2:
        return ()
    return (
        f"{path} holds several networks' weights, in {', '.join(places)}: {places[0]} is taken (--weights=NAME takes another)",
    )


def rebuild(spec: Spec, name: str | None) -> nn.Module:
    """The network that a spec tells, without its weights. Raises ValueError.

    One that a function of the user's makes has to be what `name`, FILE.py:FUNCTION[@CHECKPOINT], says: a checkpoint alone never runs code.
    """
    own = split_own_function(name or "")
    if spec.get("arch") == "function" and (own is None or own[0] != spec.get("function")):
        raise ValueError(f"its network comes from {spec.get('function')}, not from {name}")
    return _built(spec, own[0] if own else None)


def _built(spec: Spec, function: str | None) -> nn.Module:
    """The network of a spec, which may be anything that a file holds. Raises ValueError."""
    inner = {key: value for key, value in spec.items() if key not in ("mean", "std", "head", "head_classes")}
    if spec.get("arch") == "function":
        arguments = ("num_classes", "in_channels", "act", "width")
        model = build_own_function(function or "", **{key: inner[key] for key in arguments if key in inner})
    else:
        model = _known(inner)
    try:
        model = normalized(model, spec.get("mean"), spec.get("std"))
    except (TypeError, LookupError) as error:
        raise ValueError(f"it says no mean and standard deviation: {error}") from error
    if "head" in spec:
        replace_head(model, spec["head"], spec.get("head_classes", 0))
    return model


def _known(spec: Spec) -> nn.Module:
    """A network of ours or RobustBench's. Raises ValueError."""
    try:
        if find_network(str(spec.get("arch"))):
            check_size(_shapes(spec))
        return build_known(**spec)
    except (TypeError, RuntimeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"what it says of its network fits none here: {' '.join(str(error).split())}") from error


def _shapes(spec: Spec) -> StateDict:
    """The state of a network of ours, without values and memory: a spec may say any size."""
    with torch.device("meta"):
        return build_known(**spec).state_dict()


def normalization_of(flags: NetworkFlags) -> Spec:
    """What a spec keeps of --mean and --std. Raises ValueError."""
    found = statistics(flags.mean, flags.std)
    return {"mean": [*found[0]], "std": [*found[1]]} if found else {}
