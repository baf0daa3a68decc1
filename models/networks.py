"""The registry of networks: what --arch names is one `NetworkSpec` object each, registered by a file of this folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import ACTIVATIONS
from models.libraries import LIBRARIES, build_library, find_library, library_spec, split_library
from models.normalization import normalized
from models.own_function import build_own_function, split_own_function
from models.weights import check_size

# What a checkpoint keeps to rebuild its network: the arguments of build_model, numbers and strings only.
Spec = dict[str, Any]
StateDict = dict[str, Tensor]
FINETUNE_LR = 0.01  # peak learning rate for fine-tuning, unless the network has its own


@dataclass(frozen=True)
class NetworkSpec:
    """All that a network is: how it is built, the settings for flags left out, and how its plain state dict is recognised."""

    name: str  # as --arch takes it; words in capitals stand for numbers from 1 to 999: wide-resnet-DEPTH-WIDTH
    summary: str  # its line in --help
    # build(*numbers, num_classes=, in_channels=, act=[, width=]) raises ValueError for bad numbers.
    build: Callable[..., nn.Module]
    recognise: Callable[[StateDict], Spec | None]  # the spec, without act, that names and shapes tell; None: another's
    small: Spec  # the arguments of build_model for one that the tests can train in seconds
    title: str = ""  # what papers call it (the name)
    act: str = "relu"  # activation
    width: int | None = None  # channels of the first stage; None: --width has no meaning
    finetune_lr: float = FINETUNE_LR  # peak learning rate for fine-tuning

    def numbers(self, arch: str) -> tuple[int, ...] | None:
        """The numbers in `arch`, in the place of the capitals; None if it is no name of this network."""
        found = re.fullmatch(re.sub("[A-Z]+", "([1-9][0-9]{0,2})", self.name), arch)
        return tuple(map(int, found.groups())) if found else None


NETWORKS: dict[str, NetworkSpec] = {}


def register_network(network: NetworkSpec) -> None:
    """Make a network known to --arch, --help, checkpoints and tests. Raises ValueError if the name is taken."""
    if network.name in NETWORKS:
        raise ValueError(f"there is a network {network.name} already")
    NETWORKS[network.name] = network


def find_network(arch: str) -> NetworkSpec | None:
    """The registered network that a name or a spec's `arch` means; None for one from elsewhere (RobustBench, one's own function)."""
    return next((network for network in NETWORKS.values() if network.numbers(arch) is not None), None)


def describe_networks() -> str:
    """Every name that --arch takes and what it is, in one line: for --help and errors."""
    lines = [f"{network.name} ({network.summary})" for network in NETWORKS.values()]
    lines += [f"{library}:NAME" for library in LIBRARIES]
    return ", ".join([*lines, "FILE.py:FUNCTION (a function of yours that returns a network)"])


def build_model(arch: str, **kwargs: Any) -> nn.Module:
    """A network with random weights, (B, C, H, W) in [0, 1] -> logits (B, num_classes).

    arch: a registered name; timm:NAME or torchvision:NAME, with that library's input normalisation and perhaps an image_size in pixels;
    or FILE.py:FUNCTION, which is called with those of num_classes and in_channels that it takes, and with act and width if they are
    given. Raises ValueError, of one line, for an unknown name, activation or argument.
    """
    own = split_own_function(arch)
    given = {name: value for name, value in kwargs.items() if value is not None}
    if split_library(arch):
        given = {"num_classes": 10, **given}
        spec = new_spec(arch, **given)
        return normalized(build_library(arch, **given), spec["mean"], spec["std"])
    return build_own_function(own[0], **given) if own and not own[1] else build_known(arch, **given)


def build_known(arch: str, **kwargs: Any) -> nn.Module:
    """`build_model` for names other than FILE.py:FUNCTION, so that a checkpoint cannot name code to run. Raises ValueError."""
    if arch == "robustbench" and kwargs:
        from models.robustbench_zoo import build_robustbench

        return build_robustbench(**kwargs)
    if split_library(arch):
        return build_library(arch, **kwargs)
    network = find_network(arch)
    if network is None:
        raise ValueError(f"unknown network {arch!r}; choose one of {describe_networks()}")
    if kwargs.get("act", "relu") not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kwargs['act']!r}; choose one of {' '.join(ACTIVATIONS)}")
    if kwargs.get("width") and network.width is None:
        raise ValueError(f"{arch} says its width itself, leave --width out")
    return network.build(*(network.numbers(arch) or ()), **kwargs)


def check_arch(arch: str) -> None:
    """Raises ValueError, of one line, if there is no such network, without building it; FILE.py:FUNCTION is not looked into."""
    if split_library(arch):
        find_library(arch)
    elif not split_own_function(arch):
        with torch.device("meta"):
            check_size(build_known(arch).state_dict())


def new_spec(arch: str, **kwargs: Any) -> Spec:
    """What the checkpoints of a network made by `build_model(arch, **kwargs)` keep. Arguments that are None are left out."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if split_library(arch):  # which says the normalisation, unless that is given
        sizes = {name: value for name, value in given.items() if name not in ("mean", "std")}
        if odd := sizes.keys() - {"num_classes", "in_channels", "image_size"}:
            raise ValueError(f"{arch} takes no {' or '.join(sorted(odd))}")
        return library_spec(arch, **sizes) | given
    own = split_own_function(arch)
    return ({"arch": "function", "function": own[0]} if own else {"arch": arch}) | given
