"""Networks of timm and torchvision by name: timm:NAME, torchvision:NAME. Their normalisation becomes a part of the network.

Both are imported here alone, on demand: timm takes seconds. Published weights are downloaded as any others are (models/downloads.py), to
--model_dir: timm 1.0.9 can't download with today's huggingface_hub.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.downloads import downloaded
from models.weights import different, load_weights, weights_in
from utils.checkpoint import load_tensors

MOST = 10**6  # classes, channels, pixels: beyond that a number is a slip
Spec = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """What a library says of a network: image size in pixels, mean and standard deviation of the channels, where its weights are."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    address: str | None  # as `downloaded` takes it; None: there are no published weights


class Timm:
    """Any image size and number of channels; NAME may end with the tag of published weights: resnet50.a1_in1k."""

    @property
    def library(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, which no user of ours can act on
            return importlib.import_module("timm")

    def names(self) -> list[str]:
        return [*self.library.list_models()]

    def tags(self, name: str) -> list[str]:
        return [*self.library.list_pretrained(f"{name}.*")]

    def preset(self, name: str) -> Preset:
        config = self.library.models.get_pretrained_cfg(name)
        hub = f"hf:{config.hf_hub_id}/{config.hf_hub_filename or 'model.safetensors'}" if config.hf_hub_id else None
        return Preset(config.input_size[-1], config.mean, config.std, config.num_classes, hub or config.url or None)

    def head(self, name: str) -> str:
        layer = self.library.models.get_pretrained_cfg(name).classifier
        return f"{layer if isinstance(layer, str) else layer[0]}.weight"

    def build(self, name: str, num_classes: int, in_channels: int, size: int | None, **weights: Any) -> nn.Module:
        kwargs = {"num_classes": num_classes, "in_chans": in_channels, **weights}
        return sized(self.library.create_model, name, {"img_size": size}, kwargs)

    def with_weights(self, path: Path, name: str, num_classes: int, in_channels: int, size: int | None) -> nn.Module:
        weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
        return self.build(name, num_classes, in_channels, size, **weights)


class Torchvision:
    """RGB images."""

    @property
    def library(self) -> Any:
        return importlib.import_module("torchvision.models")

    def names(self) -> list[str]:
        return [*self.library.list_models(self.library)]

    def tags(self, name: str) -> list[str]:
        return []

    def preset(self, name: str) -> Preset:
        weights = self.library.get_model_weights(name).DEFAULT
        images = weights.transforms()
        classes = len(weights.meta["categories"])
        return Preset(images.crop_size[0], tuple(images.mean), tuple(images.std), classes, weights.url)

    def head(self, name: str) -> str:
        return [each for each, _ in self.library.get_model(name).named_parameters() if each.endswith("weight")][-1]

    def build(self, name: str, num_classes: int, in_channels: int, size: int | None) -> nn.Module:
        if in_channels != 3:
            raise ValueError(f"torchvision:{name} takes RGB images; of other channels, here {in_channels}, timm's do")
        return sized(self.library.get_model, name, {"image_size": size}, {"num_classes": num_classes})

    def with_weights(self, path: Path, name: str, num_classes: int, in_channels: int, size: int | None) -> nn.Module:
        model, state = self.build(name, num_classes, in_channels, size), weights_in(load_tensors(path))[0].state
        if size != (own := self.preset(name).size) and different(model.state_dict(), state):
            raise ValueError(f"torchvision's weights of {name} are for images of {own} pixels, not {size}")
        load_weights(model, state)
        return model


LIBRARIES: dict[str, Timm | Torchvision] = {"timm": Timm(), "torchvision": Torchvision()}


def sized(build: Callable[..., nn.Module], name: str, size: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """build(name), told the image size if the network has to know it: then it takes that argument."""
    try:
        return build(name, **kwargs, **size)
    except TypeError as error:
        if not any(word in str(error) for word in size):
            raise
        return build(name, **kwargs)


def split_library(name: str) -> tuple[str, str | None] | None:
    """LIBRARY:NAME and CHECKPOINT (None if there is none) of LIBRARY:NAME[@CHECKPOINT]; None for any other name."""
    arch, at, checkpoint = name.partition("@")
    library, colon, _ = arch.partition(":")
    return (arch, checkpoint if at else None) if colon and library in LIBRARIES else None


def find_library(arch: str) -> tuple[Timm | Torchvision, str]:
    """The library and the name of LIBRARY:NAME. Raises ValueError, with advice, unless the library has that network."""
    source, _, name = arch.partition(":")
    library = LIBRARIES[source]
    if name.endswith(",pretrained"):
        own = arch.removesuffix(",pretrained")
        raise ValueError(f"published weights are a start for fine-tuning: give --finetune_model --model_name={own}")
    stem, dot, _ = name.partition(".")
    names = library.names()
    if stem not in names:
        near = [f"{source}:{each}" for each in difflib.get_close_matches(stem, names, n=3, cutoff=0.4)]
        advice = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{source} has no network {name!r}{advice}")
    if dot and name not in (tags := library.tags(stem)):
        raise ValueError(f"{source} has no weights {name!r}; it has {', '.join(tags[:8]) or f'{stem} alone'}")
    return library, name


def library_spec(arch: str, num_classes: int, in_channels: int = 3, image_size: int | None = None) -> Spec:
    """What a checkpoint keeps of LIBRARY:NAME; image_size: height and width in pixels (None: the library's own). Raises ValueError.

    Mean and standard deviation are the library's; for other images than RGB, their mean over the channels.
    """
    library, name = find_library(arch)
    preset = library.preset(name)
    mean, std = preset.mean, preset.std
    if in_channels != len(mean):
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size or preset.size}
    return {"arch": arch, **sizes, "mean": [*mean], "std": [*std]}


def build_library(arch: str, num_classes: int, in_channels: int = 3, image_size: int | None = None) -> nn.Module:
    """LIBRARY:NAME with random weights, for images that are normalised already. Raises ValueError."""
    for number in (num_classes, in_channels, image_size or 1):
        if type(number) is not int or not 1 <= number <= MOST:
            raise ValueError(f"a network has no {number!r} classes, channels or pixels")
    library, name = find_library(arch)
    return library.build(name, num_classes, in_channels, image_size)


def load_library(arch: str, shape: tuple[int, int, int] | None, model_dir: Path) -> tuple[nn.Module, Spec]:
    """LIBRARY:NAME with its published weights, for normalised images of `shape`, and its spec. Raises ValueError.

    It keeps the classes that the weights are for. timm fits its weights to other channels and image sizes.
    """
    library, name = find_library(arch)
    preset = library.preset(name)
    if not preset.address:
        raise ValueError(f"there are no published weights of {arch}")
    spec = library_spec(arch, preset.num_classes, *shape[:2] if shape else ())
    path = downloaded(preset.address, model_dir)
    sizes = (spec[key] for key in ("num_classes", "in_channels", "image_size"))
    return library.with_weights(path, name, *sizes), spec


def num_classes_in(state: Mapping[str, Tensor], arch: str) -> int:
    """How many classes weights of LIBRARY:NAME are for. Raises ValueError if they have not its last layer."""
    library, name = find_library(arch)
    head = library.head(name)
    for each, weight in state.items():
        if f".{each}".endswith(f".{head}") and weight.dim():
            return len(weight)
    raise ValueError(f"it has no {head}, the last layer of {arch}")
