"""RobustBench's networks. The library is imported here alone, on demand: it takes seconds and does not import as installed."""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import nn

from utils.run_folder import new_folder_or_nothing

THREATS = ("Linf", "L2")
DATASETS = ("cifar10", "cifar100", "imagenet")


def robustbench_spec(name: str, dataset: str) -> dict[str, Any]:
    """What RB_{id} or RB_{id}_{Linf,L2} means; `threat` is None for the first."""
    threat = next((threat for threat in THREATS if name.endswith(f"_{threat}")), None)
    model_id = name.removeprefix("RB_").removesuffix(f"_{threat}")
    return {"arch": "robustbench", "model_id": model_id, "threat": threat, "dataset": dataset}


def load_robustbench(model_id: str, threat: str | None, dataset: str, model_dir: Path) -> tuple[nn.Module, str]:
    """The network `model_id` with its published weights, and the threat it was found under (Linf is looked up before L2).

    A file at model_dir/DATASET/THREAT/ID.pt is taken; else it is downloaded there. Raises ValueError if the name is unknown or the
    download yields no network; then nothing is left behind.
    """
    with _importable():
        from robustbench.utils import load_model

        threat = _find(model_id, threat, dataset)
        place = model_dir / dataset / threat
        if list(place.glob(f"{model_id}.pt*")):
            try:
                return load_model(model_id, model_dir=model_dir, dataset=dataset, threat_model=threat), threat
            except Exception as error:  # whatever the library raises, the file is what is wrong
                raise ValueError(f"{place / model_id}.pt holds no {model_id}: {_first_line(error)}") from error
        try:
            with new_folder_or_nothing(model_dir), tempfile.TemporaryDirectory(dir=model_dir) as part:
                model = load_model(model_id, model_dir=part, dataset=dataset, threat_model=threat)
                place.mkdir(parents=True, exist_ok=True)
                for file in (Path(part) / dataset / threat).glob("*"):
                    shutil.move(file, place / file.name)
        except Exception as error:
            # Without an address the weights come through timm or torchvision, which keep them in a cache of their own.
            address = _models(dataset, threat)[model_id].get("gdrive_id")
            browser = (
                f"; get https://drive.google.com/uc?id={address} in a browser and save it as {place / model_id}.pt"
            )
            problem = f"{model_id} could not be downloaded ({_first_line(error)})"
            raise ValueError(problem + (browser if address else "")) from error
    return model, threat


def build_robustbench(model_id: str, threat: str, dataset: str) -> nn.Module:
    """The network `model_id` without its weights, to load a checkpoint into. Raises ValueError for an unknown name."""
    with _importable():
        entry = _models(dataset, _find(model_id, threat, dataset))[model_id]
        model: nn.Module = entry["model"]()
        return model


def published_preparation(spec: dict[str, Any], size: int | None) -> Callable[[Image.Image], Image.Image] | None:
    """How RobustBench makes a test image of a file for this network: resize and crop. None if it does not, or to another size.

    Most of its ImageNet networks are shown 224 of 256 pixels, bilinear or bicubic; some other parts, of 224 or 288 pixels.
    """
    if spec.get("arch") != "robustbench" or spec["dataset"] != "imagenet":
        return None
    with _importable():
        from robustbench.data import get_preprocessing
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from torchvision.transforms import Compose

        whole = get_preprocessing(BenchmarkDataset.imagenet, ThreatModel(spec["threat"]), spec["model_id"], None)
    kept: Callable[[Image.Image], Image.Image] = Compose(whole.transforms[:-1])  # the last makes it a tensor
    return kept if size in (None, kept(Image.new("RGB", (256, 256))).width) else None


def _find(model_id: str, threat: str | None, dataset: str) -> str:
    """The threat whose list has model_id."""
    for candidate in [threat] if threat else THREATS:
        if model_id in _models(dataset, candidate):
            return candidate
    known = sorted({name for candidate in THREATS for name in _models(dataset, candidate)})
    near = difflib.get_close_matches(model_id, known, n=3, cutoff=0.4)
    advice = f"; did you mean {' or '.join('RB_' + name for name in near)}?" if near else ""
    raise ValueError(f"RobustBench has no {dataset} model {model_id!r} for {threat or ' or '.join(THREATS)}{advice}")


def _models(dataset: str, threat: str) -> dict[str, Any]:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    if dataset not in DATASETS:
        raise ValueError(f"RobustBench has no models for {dataset}; its networks are for {' or '.join(DATASETS)}")
    return dict(model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(threat), {}))


@contextmanager
def _importable() -> Iterator[None]:
    """robustbench 1.1.1 imports two modules that PyPI does not give: `pkg_resources` (gone from setuptools 82) and `autoattack`.

    For as long as it is imported, stand-ins are in place: for the first a module with the one function used, for the second its
    twin `pyautoattack`. Both are taken away again.
    """
    if "robustbench" in sys.modules:
        yield
        return
    stands: dict[str, ModuleType] = {}
    if importlib.util.find_spec("pkg_resources") is None:
        stands["pkg_resources"] = ModuleType("pkg_resources")
        stands["pkg_resources"].resource_filename = lambda package, name: str(  # type: ignore[attr-defined]
            Path(str(sys.modules[package].__file__)).parent / name
        )
    if importlib.util.find_spec("autoattack") is None:
        stands["autoattack"] = importlib.import_module("pyautoattack")
        stands["autoattack.state"] = importlib.import_module("pyautoattack.state")
    sys.modules.update(stands)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its libraries' own, which no user of ours can act on
            importlib.import_module("robustbench.utils")
        yield
    finally:
        for name in stands:
            sys.modules.pop(name, None)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
