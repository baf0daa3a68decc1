"""What an evaluation leaves in its folder beside images and states: eval.json, the page, and what else was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.network import Examples, Network
from attacks.results import Evaluation, table
from evaluation.images import save_as_pt
from evaluation.report import worst_examples, write_report
from evaluation.robustbench import issue_text, robustbench_fields
from evaluation.statistics import difference_table
from utils.checkpoint import write_atomic
from utils.run_folder import write_json
from utils.text import printable


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and what it is of."""

    result: Evaluation
    network: Network
    examples: Examples
    class_names: Sequence[str]


def summary(content: Mapping[str, Any]) -> str:
    """eval.json's content as the console shows it: the table, differences to the baseline, warnings, costs."""
    lines, norms = [table(content["accuracy"])], content["norms"].values()
    if norms:
        verified = sum(about["counts"].get("images_verified", 0) for about in norms)
        lines.append(f"{verified} images that broke the network were read back from their files and judged again")
    if baseline := content.get("baseline"):
        name = f"{baseline['model_name']} ({baseline['file']})"
        lines.append(difference_table(content["difference_to_baseline"], printable(name)))
    lines += [f"WARNING: {warning}" for warning in content["warnings"]]
    passes = sum(sum(about["forward_passes"]) for about in norms)
    return "\n".join([*lines, f"{content['seconds']:.0f} s; {passes} forward passes of the attacks"])


def write_files(folder: Path, content: dict[str, Any], evaluated: Evaluated) -> None:
    """Write eval.json, whose content is given, and by its settings the files of --robustbench_json and --save_adv; the page last.

    The folder has the images of the evaluation. Each file but the page is written whole or not at all. Raises OSError.
    """
    settings, examples = content["settings"], evaluated.examples
    write_json(folder / "eval.json", content)
    if settings["robustbench_json"]:
        for norm in content["norms"]:
            write_json(folder / f"robustbench_{norm}.json", robustbench_fields(content, norm))
            write_atomic(issue_text(content, norm).encode(), folder / f"issue_{norm}.md")
    if settings["save_adv"] == "pt":
        for threat, log in evaluated.result.logs.items():
            save_as_pt(folder, threat, examples.y, log.broken)
    write_page(folder / "report.html", folder, content, evaluated)


def write_page(path: Path, images: Path, content: dict[str, Any], evaluated: Evaluated) -> None:
    """Write the page of eval.json's content, with examples from the folder of the images."""
    names, examples = evaluated.class_names, evaluated.examples
    shown = worst_examples(evaluated.network, examples, evaluated.result, images, names)
    write_report(path, content, examples.y.tolist(), names, shown)
