"""What RobustBench asks of a network for its leaderboard, as far as an evaluation knows it."""

from __future__ import annotations

from typing import Any

from attacks.norms import NORMS
from attacks.results import remarks

ROBUSTBENCH = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps", "clean_acc",
    "reported", "autoattack_acc", "footnote",
)  # fmt: skip


def robustbench_fields(content: dict[str, Any], norm: str) -> dict[str, Any]:
    """The fields of RobustBench's model_info/DATASET/NORM/ID.json; null where a person must fill them in."""
    settings, accuracy, eps = content["settings"], content["accuracy"], content["norms"][norm]["eps"]
    levels = round(eps * 255, 6)
    in_levels = norm in NORMS and NORMS[norm].per_pixel and levels == round(levels)
    row = accuracy[norm]
    robust = f"{row['accuracy']:.2f}{''.join(f' ({remark})' for remark in remarks(row))}"
    full = settings["attacks"] == "autoattack"
    other = "" if full else f"; {robust} under the {settings['attacks']} attacks, not AutoAttack"
    return dict.fromkeys(ROBUSTBENCH) | {
        "name": settings["model_name"],
        "number_forward_passes": 1,
        "dataset": settings["dataset"],
        "eps": f"{levels:.0f}/255" if in_levels else f"{eps:g}",
        "clean_acc": f"{accuracy['clean']['accuracy']:.2f}",
        "autoattack_acc": robust if full else None,
        "footnote": f"{settings['n_ex']} test images{other}",
    }
