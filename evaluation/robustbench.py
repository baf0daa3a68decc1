"""What RobustBench asks of a network for its leaderboard, as far as an evaluation knows it: model_info's fields and an issue's text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attacks.results import STANDARD, remarks
from evaluation.statistics import radius_text
from utils.text import markdown, printable

FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps", "clean_acc",
    "reported", "autoattack_acc", "footnote", "unreliable",
)  # fmt: skip
BOARDS = {
    ("cifar10", "Linf"): 8 / 255,
    ("cifar10", "L2"): 0.5,
    ("cifar100", "Linf"): 8 / 255,
    ("imagenet", "Linf"): 4 / 255,
}
IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}  # of a board
METHODS = {
    "standard": "APGD-CE and APGD-T, without AutoAttack's FAB-T and Square",
    "quick": "APGD-CE and APGD-T, hopeless runs dropped, without AutoAttack's FAB-T and Square",
    "fast": "one APGD-CE",
    "autoattack": "AutoAttack (APGD-CE, APGD-T, FAB-T, Square)",
}


def robustbench_fields(content: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """The fields of RobustBench's model_info/DATASET/NORM/ID.json from eval.json's content; null where a person must fill them in."""
    settings, row = content["settings"], content["accuracy"][norm]
    robust, full = f"{row['accuracy']:.2f}", settings["attacks"] == "autoattack"
    said = "".join(f" ({remark})" for remark in remarks(row))
    other = "" if full and not said else f"; {robust}{said} under the {settings['attacks']} attacks"
    return dict.fromkeys(FIELDS) | {
        "number_forward_passes": 1,
        "dataset": settings["dataset"],
        "architecture": architecture(content["network"]),
        "eps": radius_text(norm, content["norms"][norm]["eps"]),
        "clean_acc": f"{content['accuracy']['clean']['accuracy']:.2f}",
        "autoattack_acc": robust if full and not said else None,
        "footnote": f"{settings['n_ex']} test images{other}{'' if full else ', not AutoAttack'}",
    }


def architecture(spec: Mapping[str, Any]) -> str | None:
    """The network of a spec, None if that names no architecture."""
    return None if spec["arch"] in ("function", "robustbench") else str(spec["arch"])


def shortfalls(content: Mapping[str, Any], norm: str) -> list[str]:
    """Why the accuracy in a norm is not what a board would show."""
    settings, dataset, n = content["settings"], content["settings"]["dataset"], content["settings"]["n_ex"]
    found = [f"--attacks={settings['attacks']}"] if settings["attacks"] in ("quick", "fast") else []
    changed = ("n_iter", "n_restarts", "n_targets")
    found += [f"--{name}={settings[name]}" for name in changed if settings[name] != getattr(STANDARD, name)]
    found += remarks(content["accuracy"][norm])
    if (dataset, norm) not in BOARDS:
        return [*found, f"there is no board of {norm} on {dataset}"]
    eps, board = content["norms"][norm]["eps"], BOARDS[dataset, norm]
    if not math.isclose(eps, board, rel_tol=1e-6):
        found.append(f"the radius is {radius_text(norm, eps)}, the board's {radius_text(norm, board)}")
    if dataset == "imagenet":
        found.append(f"{n} images, not the board's {IMAGES[dataset]}, a choice of its own")
    elif n != IMAGES[dataset]:
        found.append(f"{n} of {IMAGES[dataset]} test images")
    return found


def issue_text(content: Mapping[str, Any], norm: str) -> str:
    """The text of RobustBench's issue "New Model(s)", in Markdown, from eval.json's content; TO FILL IN where only a person knows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),  # values are text, not Markdown
    )
    return page.get_template("robustbench_issue.md").render(
        content,
        norm=norm,
        row=content["accuracy"][norm],
        fields=robustbench_fields(content, norm),
        shortfalls=shortfalls(content, norm),
        remarks=remarks,
        method=METHODS[content["settings"]["attacks"]],
        command=Markup(printable(shlex.join(content["environment"]["command"]), 10_000)),
    )
