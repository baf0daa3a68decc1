"""Networks by name: one's own checkpoints, the authors' files, RobustBench's (`RB_{id}`), and any function (`FILE.py:FUNCTION`)."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gdown
import torch
from torch import Tensor, nn

from models.networks import NETWORKS, Spec, StateDict, build_known
from models.own_function import build_own_function, split_own_function
from models.robustbench_zoo import THREATS, load_robustbench
from utils.checkpoint import load_tensors, state_dict_of
from utils.run_folder import new_folder_or_nothing

AUTHORS_FOLDER = "1hYWHp5UbTAm9RhSb8JkJZtcB0LDZDvkT"  # on Google Drive: pretr_Linf.pth, pretr_L2.pth, pretr_L1.pth
UNUSED = "sub_block1."  # many published wide residual networks have a block beside block1 that no pass goes through


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, how to rebuild it, and what its checkpoint says of itself (empty for other files)."""

    model: nn.Module
    spec: Spec
    about: dict[str, Any]


def load_model(name: str, model_dir: str, dataset: str, act: str | None = None, arch: str | None = None) -> Loaded:
    """The network called `name`: RB_{id}, RB_{id}_{Linf,L2}, FILE.py:FUNCTION, FILE.py:FUNCTION@CHECKPOINT, or a checkpoint's path.

    A checkpoint is looked for as given and in model_dir; `pretr_*` is downloaded to model_dir if missing. `dataset` tells which of
    RobustBench's lists is meant, `act` the activation of a plain state dict (its name may say act=...; else softplus1, and relu of
    wide residual networks). `arch`, if given, has to be the network that a checkpoint says or looks like. Raises ValueError that says what
    to do.
    """
    function, checkpoint = split_own_function(name) or (None, None)
    if arch and (function or name.startswith("RB_")):
        raise ValueError(f"{name} has a network of its own; leave --arch={arch} out")
    if name.startswith("RB_"):
        spec = _robustbench_spec(name, dataset)
        model, spec["threat"] = load_robustbench(spec["model_id"], spec["threat"], dataset, Path(model_dir))
        return Loaded(model, spec, {})
    if function and not checkpoint:
        return Loaded(build_own_function(function), {"arch": "function", "function": function}, {})
    path = Path(checkpoint) if checkpoint else _find_file(name, Path(model_dir))
    try:
        return _from_file(path, dataset, act, arch, function)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def rebuild(spec: Spec, name: str | None) -> nn.Module:
    """The network that a spec tells, without its weights. Raises ValueError.

    One that a function of the user's makes has to be what `name`, FILE.py:FUNCTION[@CHECKPOINT], says: a checkpoint alone never runs code.
    """
    if spec.get("arch") != "function":
        return build_known(**spec)
    own = split_own_function(name or "")
    if own is None or own[0] != spec["function"]:
        raise ValueError(f"its network comes from {spec['function']}, not from {name}")
    arguments = ("num_classes", "in_channels", "act", "width")
    return build_own_function(own[0], **{key: spec[key] for key in arguments if key in spec})


def _robustbench_spec(name: str, dataset: str) -> Spec:
    """What RB_{id} or RB_{id}_{Linf,L2} means; `threat` is None for the first."""
    threat = next((threat for threat in THREATS if name.endswith(f"_{threat}")), None)
    model_id = name.removeprefix("RB_").removesuffix(f"_{threat}")
    return {"arch": "robustbench", "model_id": model_id, "threat": threat, "dataset": dataset}


def _from_file(
    path: Path, dataset: str, act: str | None = None, arch: str | None = None, function: str | None = None
) -> Loaded:
    """The network of a checkpoint or plain state dict; `function`: what makes it, called as the checkpoint's spec says."""
    content = load_tensors(path)
    state, spec = state_dict_of(content), _spec_in(content)
    if function:
        spec = (spec if spec.get("arch") == "function" else {}) | {"arch": "function", "function": function}
    elif spec.get("arch") == "function":
        own = spec["function"]
        raise ValueError(f"its network comes from {own}; name both: --model_name='{own}@{path}'")
    elif not spec:
        spec = _spec_of_plain_file(path, state, dataset, act, arch)
    elif act and act != spec.get("act", act):
        raise ValueError(f"it was trained with --act={spec['act']}, not {act}")
    if arch and arch != spec.get("arch"):
        raise ValueError(f"its network is {spec.get('arch')}; leave --arch={arch} out")
    model = rebuild(spec, function)
    _load_weights(model, state)
    return Loaded(model, spec, _about(content))


def _spec_in(content: Any) -> Spec:
    found = content.get("spec") if isinstance(content, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def _about(content: Any) -> dict[str, Any]:
    keys = ("dataset", "image_size", "epoch", "threats") if isinstance(content, dict) else ()
    return {key: content[key] for key in keys if key in content}


def _spec_of_plain_file(path: Path, state: StateDict, dataset: str, act: str | None, arch: str | None) -> Spec:
    """The network of a state dict that says nothing of itself: names and shapes tell which of ours and its sizes.

    A run of the authors' may tell by its name the activation or, unless `arch` does, a network of RobustBench's (`act=...`, `fts=RB_...`).
    """
    told = dict(re.findall(r"(act|fts)=([\w.-]+)", f"{path.parent.name} {path.name}"))
    if not arch and told.get("fts", "").startswith("RB_"):
        spec = _robustbench_spec(told["fts"], dataset)
        return spec | {"threat": spec["threat"] or "Linf"}
    for network in NETWORKS.values():
        if found := network.recognise(state):
            return found | {"act": act or told.get("act") or network.act}
    raise ValueError(
        f"it is a checkpoint of another network than {' and '.join(NETWORKS)}; take RobustBench's as RB_{{id}}, "
        "build others with FILE.py:FUNCTION@CHECKPOINT"
    )


def _load_weights(model: nn.Module, state: StateDict) -> None:
    own = model.state_dict()
    # PyTorch before 0.4.1 did not count BatchNorm's batches, and nothing here asks for the number.
    counts = {name: count for name, count in own.items() if name.endswith("num_batches_tracked")}
    state = counts | {name: tensor for name, tensor in state.items() if name in own or not name.startswith(UNUSED)}
    shapes, expected = ({name: each.shape for name, each in both.items()} for both in (state, own))
    if odd := sorted({name for name, _ in shapes.items() ^ expected.items()}):
        differ = f"{len(odd)} of {len(own)} names or shapes differ, the first {odd[0]}"
        raise ValueError(f"it is a checkpoint of another network: {differ}")
    model.load_state_dict(state)


def _find_file(name: str, model_dir: Path) -> Path:
    """The checkpoint `name` as given or in model_dir, with or without .pth; a missing pretr_* is downloaded to model_dir."""
    file_name = Path(name).name if name.endswith((".pth", ".pt")) else f"{Path(name).name}.pth"
    for path in (Path(name), Path(name).parent / file_name, model_dir / name, model_dir / file_name):
        if path.is_file():
            return path
    if Path(name).is_dir():
        found = sorted(Path(name).glob("*.pth"), key=lambda path: path.stat().st_mtime)
        such = f", such as {found[-1]}" if found else ", it has none"
        raise ValueError(f"{name} is a folder; name a checkpoint in it{such}")
    if re.fullmatch(r"pretr_(Linf|L2|L1)\.pth", file_name):
        download_authors_file(file_name, model_dir)
        return model_dir / file_name
    raise ValueError(f"there is no file {name}, here or in --model_dir={model_dir}")


def download_authors_file(file_name: str, model_dir: Path) -> None:
    """Download one of the authors' networks to model_dir. Raises ValueError, with nothing left behind, if it does not load."""
    try:
        files = gdown.download_folder(id=AUTHORS_FOLDER, skip_download=True, quiet=True) or []
        [file_id] = [file.id for file in files if Path(file.path).name == file_name]
        with new_folder_or_nothing(model_dir), tempfile.TemporaryDirectory(dir=model_dir) as part:
            path = Path(part) / file_name
            gdown.download(id=file_id, output=str(path), quiet=False)
            _from_file(path, "cifar10")
            shutil.move(path, model_dir / file_name)
    except Exception as error:  # gdown raises whatever its parsers and sockets do
        raise ValueError(
            f"{file_name} is not in --model_dir={model_dir} and could not be downloaded; get it in a browser from "
            f"https://drive.google.com/drive/folders/{AUTHORS_FOLDER} and save it there"
        ) from error


def check_one_point(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless the model can be trained on a single image of `shape` (C, H, W): some BatchNorms can't."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(_grey_image(model, shape))
    except ValueError as error:
        raise ValueError(f"the network can't learn from a single image: {error}") from error


def check_fits(model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Raises ValueError unless the model takes one image of `shape` (C, H, W) and gives (1, num_classes) logits."""
    try:
        with torch.no_grad():
            logits = model(_grey_image(model, shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the network does not take images of shape {shape}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network must give logits of shape (B, {num_classes}), it gave {got} for one image")


def _grey_image(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.full((1, *shape), 0.5, device=device)
