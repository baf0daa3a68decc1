"""Checkpoints as .safetensors: weights by name, and beside them one JSON text of what a checkpoint says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from utils.run_folder import parse_json

SUFFIX, KEY = ".safetensors", "checkpoint"  # KEY: of the JSON text in the metadata, which hold texts alone


def is_safetensors(path: Path) -> bool:
    """By its name, or by how it begins: the length of a header, then a JSON object. No file of torch.save begins so."""
    with path.open("rb") as file:
        return path.suffix == SUFFIX or file.read(9)[8:] == b"{"


def load_safetensors(path: Path) -> dict[str, Any]:
    """{"state_dict": the tensors, on the CPU} and what the metadata say, if this program wrote them. Raises whatever the library does."""
    with safe_open(path, framework="pt") as file:
        # Copies: the library's tensors lie in the mapped file, which may change while they are in use.
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = (file.metadata() or {}).get(KEY, "{}")
    try:
        about = parse_json(text)
    except ValueError:  # somebody else's text under that name
        about = {}
    return {**(about if isinstance(about, dict) else {}), "state_dict": state}


def safetensors_bytes(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """What `load_safetensors` reads: the state, and `about`, of values that JSON has."""
    # The library refuses tensors that share memory, such as tied weights.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(tensors, {"format": "pt", KEY: json.dumps(dict(about))})
