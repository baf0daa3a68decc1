"""What RobustBench asks for: the fields of its model_info files, and the text of an issue that submits a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attacks.results import remarks
from evaluation.statistics import radius_in_words
from utils.run_folder import write_json
from utils.text import printable

FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps", "clean_acc",
    "reported", "autoattack_acc", "footnote", "unreliable",
)  # fmt: skip
# Its leaderboards for Lp norms, by folder of model_info: radius and number of test images.
BOARDS = {
    "cifar10/Linf": ("8/255", 10_000),
    "cifar10/L2": ("0.5", 10_000),
    "cifar100/Linf": ("8/255", 10_000),
    "imagenet/Linf": ("4/255", 5_000),
}
BLANK = "(to be filled in)"
ISSUE = """{gaps}# Paper Information

- **Paper Title**: {blank}
- **Paper URL**: {blank}
- **Paper authors**: {blank}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {blank}
- **Dataset**: {dataset}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {clean}
- **Robust accuracy**: {robust}
- **Additional data**: {blank}
- **Evaluation method**: {method}, {n_ex} test images
- **Checkpoint and code**: {blank} (evaluated as {network})

# Model Zoo

- [ ] I want to add my models to the Model Zoo
- [ ] I use an architecture that is in the Model Zoo already or in `timm`; if not, a link to it: {blank}
- [ ] I release my models under the MIT license, or under the one at: {blank}
"""


def write_leaderboard_files(content: dict[str, Any], folder: Path) -> None:
    """robustbench_NORM.json and issue_NORM.md for each norm of eval.json's content. Raises OSError."""
    for norm in content["norms"]:
        write_json(folder / f"robustbench_{norm}.json", robustbench_fields(content, norm))
        (folder / f"issue_{norm}.md").write_text(robustbench_issue(content, norm))


def robustbench_fields(content: dict[str, Any], norm: str) -> dict[str, Any]:
    """The fields of RobustBench's model_info/DATASET/NORM/ID.json; null where a person must fill them in."""
    settings, robust = content["settings"], _robust(content, norm)
    full = settings["attacks"] == "autoattack"
    other = "" if full else f"; {robust} under the {settings['attacks']} attacks, not AutoAttack"
    return dict.fromkeys(FIELDS) | {
        "name": settings["model_name"],
        "number_forward_passes": 1,
        "dataset": settings["dataset"],
        "eps": radius_in_words(norm, content["norms"][norm]["eps"]),
        "clean_acc": f"{content['accuracy']['clean']['accuracy']:.2f}",
        "autoattack_acc": robust if full else None,
        "footnote": f"{settings['n_ex']} test images{other}",
        "unreliable": bool(content["warnings"]),
    }


def robustbench_issue(content: dict[str, Any], norm: str) -> str:
    """An issue for RobustBench's repository in Markdown, as its template "New Model(s)" asks; first what is missing for a claim."""
    settings, missing = content["settings"], gaps(content, norm)
    method = "AutoAttack" if settings["attacks"] == "autoattack" else f"{settings['attacks']} attacks of eval.py"
    return ISSUE.format(
        gaps=f"**No claim for the leaderboard yet:** {'; '.join(missing)}. Delete this line then.\n\n"
        if missing
        else "",
        blank=BLANK,
        dataset=settings["dataset"],
        norm=norm,
        eps=radius_in_words(norm, content["norms"][norm]["eps"]),
        clean=f"{content['accuracy']['clean']['accuracy']:.2f}",
        robust=_robust(content, norm),
        method=method,
        n_ex=settings["n_ex"],
        network=printable(settings["model_name"], 1000),
    )


def gaps(content: dict[str, Any], norm: str) -> list[str]:
    """What keeps an evaluation from being a claim for RobustBench's leaderboard of this norm, in words."""
    settings, found = content["settings"], list[str]()
    eps, n = BOARDS.get(f"{settings['dataset']}/{norm}", (None, None))
    if eps is None:
        found.append(f"there is no leaderboard for {norm} on {settings['dataset']}")
    elif eps != radius_in_words(norm, content["norms"][norm]["eps"]):
        found.append(f"the leaderboard's radius is {eps}, not {radius_in_words(norm, content['norms'][norm]['eps'])}")
    if n and n != settings["n_ex"]:
        found.append(f"it counts {n} test images, not {settings['n_ex']} (--n_ex={n})")
    if settings["attacks"] != "autoattack":
        found.append("it counts AutoAttack's accuracy (--attacks=autoattack)")
    return found + [f"a warning: {warning}" for warning in content["warnings"]]


def _robust(content: dict[str, Any], norm: str) -> str:
    """Accuracy in per cent, and what makes it less than it looks."""
    row = content["accuracy"][norm]
    return f"{row['accuracy']:.2f}{''.join(f' ({remark})' for remark in remarks(row))}"
