"""Networks: images (B, C, H, W) in [0, 1] -> logits (B, K), any normalisation inside. Each file here registers its own."""

import importlib
import pkgutil

from models.layers import ACTIVATIONS
from models.networks import NETWORKS, NetworkSpec, Spec, build_model, find_network, new_spec, register_network

__all__ = [
    "ACTIVATIONS",
    "NETWORKS",
    "NetworkSpec",
    "Spec",
    "build_model",
    "find_network",
    "new_spec",
    "register_network",
]

# A new network is a new file in this folder: all of them are imported, so that each can register what it has.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
