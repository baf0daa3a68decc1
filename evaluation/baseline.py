"""--baseline: another evaluation's eval.json, checked whole before the first pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.statistics import paired, upper_bounds
from utils.run_folder import read_json

SAME = ("dataset", "n_ex", "image_size", "class_order")  # settings that tell which images
EARLIER = {"class_order": "name"}  # of versions that did not say it
LARGEST = 2**30  # bytes; an evaluation of a million images has less


def read_baseline(path: str) -> dict[str, Any]:
    """The content of eval.json. Raises ValueError, OSError."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"{path} is too large for an eval.json")
    return read_json(path)


def check_baseline(path: str, content: dict[str, Any], settings: Mapping[str, Any], radii: Mapping[str, float]) -> None:
    """Raises ValueError unless each row that both evaluations have compares: the same images, and the same radius of a norm.

    settings and radii, by norm, are this evaluation's. The union of other norms is another figure: it is taken out of `content`.
    """
    there, outcomes, norms = (content.get(name) for name in ("settings", "outcomes", "norms"))
    _check_settings(path, there if isinstance(there, dict) else {}, settings)
    if not isinstance(outcomes, dict) or not isinstance(norms, dict) or "clean" not in outcomes:
        raise ValueError(f"{path} does not tell the outcome of each image: another version of eval.py wrote it")
    for name, values in outcomes.items():
        _check_outcomes(path, name, values, settings["n_ex"])
    for norm in radii.keys() & {*norms, *outcomes}:
        _check_radius(path, norm, norms.get(norm), radii[norm])
    if norms.keys() != radii.keys():
        outcomes.pop("union", None)


def compared(content: Mapping[str, Any], baseline: Mapping[str, Any], path: str) -> dict[str, Any]:
    """eval.json's fields of --baseline: which network it is, by what attacks, and the differences to it, this evaluation minus that one."""
    bounds, settings = upper_bounds(content) | upper_bounds(baseline), baseline["settings"]
    about = {"file": path} | {name: str(settings.get(name, "unknown")) for name in ("model_name", "attacks")}
    return {"baseline": about, "difference_to_baseline": paired(content["outcomes"], baseline["outcomes"], bounds)}


def _check_settings(path: str, there: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    n, dataset = settings["n_ex"], settings["dataset"]
    if (there.get("dataset"), there.get("n_ex")) != (dataset, n):
        raise ValueError(f"{path} is not an evaluation of {n} test images of {dataset}")
    for name in SAME:
        if there.get(name, EARLIER.get(name)) != settings.get(name):
            raise ValueError(f"{path}: its {name} is {there.get(name)}, here it is {settings.get(name)}")


def _check_outcomes(path: str, name: str, values: Any, n: int) -> None:
    if not isinstance(values, list) or len(values) != n or not all(type(v) is int and v in (0, 1) for v in values):
        raise ValueError(f"{path}: its outcomes of {name} are not {n} numbers, 0 or 1 for each image")


def _check_radius(path: str, norm: str, about: Any, here: float) -> None:
    eps = about.get("eps") if isinstance(about, dict) else None
    if not isinstance(eps, float | int) or not math.isclose(eps, here, rel_tol=1e-6):
        raise ValueError(f"{path}: its radius in {norm} is {eps}, here it is {here:.6g}")
