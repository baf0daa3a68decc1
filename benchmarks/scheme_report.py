"""Table and picture of compare_schemes.py: what the seeds of each scheme came to, and what it cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from plot import save
from plotting.comparison import Group, Outcomes, Result, cell, markdown
from plotting.networks import outcomes_of
from plotting.style import COLOURS, in_order, write_labels
from plotting.tables import difference_table, over
from utils.pictures import picture_style

Line = dict[str, Any]  # of results.jsonl: a scheme with a seed


def packed(outcomes: Sequence[int]) -> str:
    """Outcomes of 0 and 1, an image each, as hexadecimal digits."""
    return np.packbits(np.array(outcomes, dtype=np.uint8)).tobytes().hex()


def outcomes(line: Line) -> dict[str, Outcomes]:
    """The line's outcomes (N,), clean, in each norm, their average and the union, where it has them."""
    packed = {name: np.frombuffer(bytes.fromhex(text), np.uint8) for name, text in line.get("outcomes", {}).items()}
    found = {name: np.unpackbits(values)[: line["points"]] for name, values in packed.items()}
    return outcomes_of(found, [name for name in found if name not in ("clean", "union")])


class Row(Group):
    """A scheme's results, by seed."""

    def __init__(self, scheme: str, lines: Sequence[Line]) -> None:
        self.lines = lines
        results = {line["seed"]: Result(line["accuracy"], line["points"], outcomes(line)) for line in lines}
        super().__init__(scheme, results)

    @property
    def cost(self) -> float:
        """Thousands of passes of a batch in training, forward and backward."""
        return float(np.mean([sum(line["passes"].values()) * line["updates"] for line in self.lines])) / 1000


def table(title: str, rows: Sequence[Row], baseline: str, missing: Sequence[str]) -> str:
    """table.md: both tables, and what it takes to read them. missing: names of what is not finished."""
    lines = [line for row in rows for line in row.lines]
    names = in_order(set.intersection(*(set(line["accuracy"]) for line in lines)))
    said = {key: ", ".join(dict.fromkeys(str(line[key]) for line in lines)) for key in ("setting", "points", "device")}
    commits = ", ".join(dict.fromkeys(line[name][:12] for line in lines for name in ("commit", "eval_commit")))
    heads = ["scheme", *names, "passes per image", "epochs", "passes in all (1000 batches)", "seeds"]
    results = []
    for row in rows:
        ways = [np.mean([line["passes"][way] for line in row.lines]) for way in ("forward", "backward")]
        costs = ["{:.1f} + {:.1f}".format(*ways), f"{row.lines[0]['epochs']}", f"{row.cost:.2f}", str(len(row.lines))]
        results.append([row.label, *(cell(row.estimate(name)) for name in names), *costs])
    text = [
        f"# {title}",
        f"{said['setting']}. Accuracy in % of the first {said['points']} test images, mean ± standard error over seeds and "
        "images; differences between schemes, which have the same images, are more precise.\n",
        *markdown(heads, results),
        "\nPasses of the network per training image, forward + backward, of attack and weight update together. "
        f"On {said['device']}. Commit {commits}; {', '.join(sorted({line['date'][:10] for line in lines}))}.",
    ]
    for base in [row for row in rows if row.label == baseline]:
        others = [row for row in rows if row is not base and row.pairs(base)]
        text += [f"\nPaired differences in points{over([*others, base])}.\n"] * bool(others)
        text += markdown(*difference_table(others, base, names)) if others else []
    shared = [flag for flag in lines[0]["train"] if all(flag in line["train"] for line in lines)]
    begun = f"; all fine-tune `train.py {shlex.join(lines[0]['start'])}`" * bool(lines[0]["start"])
    text.append(f"\n`eval.py {shlex.join(lines[0]['eval'])}`{begun}; `train.py {shlex.join(shared)} --seed=SEED` and\n")
    for row in rows:
        line = row.lines[0]
        own = shlex.join(flag for flag in line["train"] if flag not in shared)
        text.append(f"* {row.label} ({' '.join(line['norms'])}): {f'`{own}`' if own else 'nothing else'}")
    text += [f"\n**Not finished**: {', '.join(missing)}."] * bool(missing)
    warnings = [f"* {line['scheme']}, seed {line['seed']}: {each}" for line in lines for each in line["warnings"]]
    text += ["\n**Warnings of eval.py**:\n", *warnings] if warnings else []
    return "\n".join(text) + "\n"


def draw(rows: Sequence[Row]) -> Figure:
    """Union accuracy against what training cost, and against clean accuracy."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    unions = [row.estimate("union") for row in rows]
    places = {left: [(row.cost, 0.0) for row in rows], right: [row.estimate("clean") for row in rows]}
    shades = [COLOURS[number % len(COLOURS)] for number in range(len(rows))]  # names tell those of one colour apart
    for axes, across in places.items():
        for (x, aside), (y, up), shade in zip(across, unions, shades, strict=True):
            axes.errorbar(x, y, up, aside, fmt="o", color=shade, markersize=6, elinewidth=0.8)
    left.set(xlabel="passes in training (1000 batches)", ylabel="accuracy on the union (%)", xlim=(0, None))
    right.set(xlabel="clean accuracy (%)")
    settings = "; ".join(dict.fromkeys(line["setting"] for row in rows for line in row.lines))
    figure.suptitle(f"{settings}; mean and standard error over seeds and images", fontsize=9)
    figure.draw_without_rendering()  # from here on places in pixels are known
    for axes, across in places.items():
        spots = [(x, y) for (x, _), (y, _) in zip(across, unions, strict=True)]
        write_labels(axes, spots, [row.label for row in rows], shades)
    return figure


def write_report(title: str, rows: Sequence[Row], baseline: str, missing: Sequence[str], folder: Path) -> None:
    """table.md, compare.png and compare.pdf."""
    text = table(title, rows, baseline, missing)
    (folder / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"\n{text}\nwrote {folder}/table.md", flush=True)
    with picture_style():
        save({"compare": draw(rows)}, folder)
