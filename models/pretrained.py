"""Networks by name: one's own checkpoints, the authors' files, RobustBench's (`RB_{id}`), and any function (`FILE.py:FUNCTION`)."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from pathlib import Path

import gdown
import torch
from torch import Tensor, nn

from models.downloads import downloaded, is_remote
from models.from_file import Loaded, NetworkFlags, from_file, normalization_of, rebuild
from models.libraries import load_library, split_library
from models.normalization import normalized
from models.own_function import split_own_function
from models.robustbench_zoo import load_robustbench, robustbench_spec
from utils.run_folder import new_folder_or_nothing

AUTHORS_FOLDER = "1hYWHp5UbTAm9RhSb8JkJZtcB0LDZDvkT"  # on Google Drive: pretr_Linf.pth, pretr_L2.pth, pretr_L1.pth


def load_model(name: str, model_dir: str, dataset: str, flags: NetworkFlags = NetworkFlags()) -> Loaded:  # noqa: B008
    """The network called `name`: RB_{id}, RB_{id}_{Linf,L2}, FILE.py:FUNCTION[@CHECKPOINT], LIBRARY:NAME[@CHECKPOINT], or a checkpoint.

    A checkpoint is a path, looked for as given and in model_dir, or what `downloaded` takes: https://..., hf:USER/REPO/FILE; `pretr_*`
    is downloaded to model_dir if missing. LIBRARY:NAME alone has that library's published weights, downloaded too. `dataset` tells which of
    RobustBench's lists is meant. For weights alone, names and shapes tell the network, `flags` or the file's name its activation (else
    the network's own), `flags` or buffers in the file its input normalisation (else none); notes say it. What a checkpoint tells is not
    changed by flags. Raises ValueError that says what to do.
    """
    if name.startswith("RB_"):
        return _from_robustbench(name, dataset, flags, Path(model_dir))
    maker, checkpoint = split_own_function(name) or split_library(name) or (None, None)
    if maker:
        of_library = split_library(maker)
        _refuse(name, flags, "arch", *(["act"] if of_library else []))
        if not checkpoint:
            return _published(maker, flags, Path(model_dir)) if of_library else _made(maker, flags)
    path = _find_file(name, checkpoint, Path(model_dir))
    try:
        return from_file(path, dataset, flags, maker)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def _from_robustbench(name: str, dataset: str, flags: NetworkFlags, model_dir: Path) -> Loaded:
    """RB_{id} or RB_{id}_{Linf,L2}. Raises ValueError."""
    _refuse(name, flags, "arch", "act", "mean", "std", "weights")
    spec = robustbench_spec(name, dataset)
    model, spec["threat"] = load_robustbench(spec["model_id"], spec["threat"], dataset, model_dir)
    return Loaded(model, spec, {})


def _made(function: str, flags: NetworkFlags) -> Loaded:
    """The network that FILE.py:FUNCTION makes. Raises ValueError."""
    _refuse(function, flags, "act", "weights")
    spec = {"arch": "function", "function": function} | normalization_of(flags)
    return Loaded(rebuild(spec, function), spec, {})


def _published(arch: str, flags: NetworkFlags, model_dir: Path) -> Loaded:
    """LIBRARY:NAME with its published weights; those for 1,000 classes are of ImageNet. Raises ValueError."""
    _refuse(arch, flags, "mean", "std", "weights")
    model, spec = load_library(arch, flags.shape, model_dir)
    about = {"image_size": spec["image_size"]} | ({"dataset": "imagenet"} if spec["num_classes"] == 1000 else {})
    return Loaded(normalized(model, spec["mean"], spec["std"]), spec, about)


def _refuse(name: str, flags: NetworkFlags, *keys: str) -> None:
    """Raises ValueError if a flag is given that can't change this network."""
    if refused := [f"--{key}" for key in keys if getattr(flags, key) is not None]:
        raise ValueError(f"{name} says that itself; leave {' and '.join(refused)} out")


def _find_file(name: str, checkpoint: str | None, model_dir: Path) -> Path:
    """FILE.py:FUNCTION's checkpoint; else that called `name`, as given or in model_dir, with or without .pth. Some are downloaded."""
    if is_remote(checkpoint or name):
        return downloaded(checkpoint or name, model_dir)
    if checkpoint:
        return Path(checkpoint)
    file_name = Path(name).name if name.endswith((".pth", ".pt", ".safetensors")) else f"{Path(name).name}.pth"
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
            from_file(path, "cifar10")
            shutil.move(path, model_dir / file_name)
    except Exception as error:  # gdown raises whatever its parsers and sockets do
        raise ValueError(
            f"{file_name} is not in --model_dir={model_dir} and could not be downloaded; get it in a browser from "
            f"https://drive.google.com/drive/folders/{AUTHORS_FOLDER} and save it there"
        ) from error


def check_trains(model: nn.Module, shape: tuple[int, int, int], num_classes: int, n: int) -> None:
    """Raises ValueError unless the model can be trained on n images of `shape` (C, H, W), of which some BatchNorms need two."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the network has no parameters to train")
    try:
        with torch.enable_grad():
            logits = copy.deepcopy(model).train()(_grey_images(model, shape, n))
    except Exception as error:  # whatever a user's network raises
        what = "a single image" if n == 1 else f"{n} images of shape {shape}"
        raise ValueError(f"the network can't learn from {what}: {_first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (n, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"in train mode the network must give logits of shape (B, {num_classes}), it gave {got} for {n} images"
        )
    if not logits.requires_grad:
        raise ValueError("the network's logits do not depend on its parameters through autograd: it can't be trained")


def check_fits(model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Raises ValueError unless the model takes one image of `shape` (C, H, W) and gives (1, num_classes) logits."""
    try:
        with torch.no_grad():
            logits = model(_grey_images(model, shape, 1))
    except Exception as error:  # whatever a user's network raises
        raise ValueError(f"the network does not take images of shape {shape}: {_first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes) or logits.is_complex():
        got = f"{tuple(logits.shape)}, {logits.dtype}," if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network must give real logits of shape (B, {num_classes}), it gave {got} for one image")


def _grey_images(model: nn.Module, shape: tuple[int, int, int], n: int) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.full((n, *shape), 0.5, device=device)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
