"""A run's folder: what was asked, where it ran, what came out."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import save_whole

PACKAGES = ("torch", "torchvision", "numpy", "robustbench", "gdown", "scikit-learn", "tqdm")


def new_folder(parent: str, parts: list[str]) -> Path:
    """Make parent/NAME, NAME of the non-empty parts in portable letters; -2, -3, ... behind it if there is one. Raises OSError."""
    name = "_".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-.") for part in parts if part)[:180]
    Path(parent).mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = Path(parent) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def environment(device: torch.device) -> dict[str, Any]:
    """Command, commit, versions, device and time: what it takes to run the same again."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.processor()}".strip(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a last newline."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """One more object, on one line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def save_images(folder: Path, threat_name: str, x_adv: Tensor, y: Tensor, robust: Tensor) -> Path:
    """Adversarial images (N, ...) of one threat model, named by it, with labels and which points stand (there the image is clean)."""
    path = folder / f"adv_{threat_name.replace(' ', '_')}.pth"
    save_whole({"x_adv": x_adv, "y": y, "robust": robust}, path)
    return path


def table(rows: dict[str, dict[str, float]], title: str = "") -> str:
    """Accuracy, 95 % interval and number of points, a line each."""
    lines = [f"{title:<28}accuracy   95 % interval   points"]
    lines += [
        f"  {name:<26}{r['accuracy']:7.2f} %  [{r['low']:5.1f}, {r['high']:5.1f}]   {r['points']:6d}"
        for name, r in rows.items()
    ]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")
