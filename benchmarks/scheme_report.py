"""Table and picture of compare_schemes.py: what the seeds of each scheme came to, and what it cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from plot import COLOURS, STYLE, in_order, write_beside

Line = dict[str, Any]  # of results.jsonl: a scheme with a seed


class Row:
    """A scheme's results."""

    def __init__(self, scheme: str, lines: Iterable[Line]) -> None:
        self.scheme, self.lines = scheme, {line["seed"]: line for line in lines}

    def accuracies(self, name: str) -> list[float]:
        """One a seed."""
        return [line["accuracy"][name] for line in self.lines.values()]

    def mean(self, value: Callable[[Line], float]) -> float:
        """Over the seeds; nan if one of them has none."""
        return float(np.mean([value(line) for line in self.lines.values()]))

    def differences(self, other: Row, name: str) -> list[float]:
        """To the other's accuracies, for the seeds that both have."""
        both = [seed for seed in self.lines if seed in other.lines]
        return [self.lines[seed]["accuracy"][name] - other.lines[seed]["accuracy"][name] for seed in both]

    def spread(self, name: str) -> float:
        """Deviation over the seeds; of one seed the standard error that so few test images have."""
        if len(self.lines) > 1:
            return deviation(self.accuracies(name))
        [line] = self.lines.values()
        share = line["accuracy"][name] / 100
        return 100 * math.sqrt(share * (1 - share) / line["points"])

    def cost(self) -> float:
        """Thousands of passes of a batch in training, forward and backward; nan if train.py did not count them."""
        return self.mean(lambda line: (forward(line) + backward(line)) * line["updates"] / 1000)


def forward(line: Line) -> float:
    """Passes of a training step, with its attack."""
    return line["passes"]["forward"] if line["passes"] else math.nan


def backward(line: Line) -> float:
    """The same, backward."""
    return line["passes"]["backward"] if line["passes"] else math.nan


def deviation(values: Sequence[float]) -> float:
    """Standard deviation as of a sample; nan of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def figure_of(mean: float, more: float, sign: str = "") -> str:
    """Mean ± more, if that is known."""
    return f"{mean:{sign}.1f}" + ("" if math.isnan(more) else f" ± {more:.1f}")


def rounded(value: float, digits: int) -> str:
    """A number, or ? if it is not known."""
    return "?" if math.isnan(value) else f"{value:.{digits}f}"


def accuracy_names(rows: Sequence[Row]) -> list[str]:
    """Those that all have, in the usual order."""
    return in_order(set.intersection(*(set(line["accuracy"]) for row in rows for line in row.lines.values())))


def results_table(rows: Sequence[Row]) -> list[str]:
    """Markdown: accuracies over the seeds and costs, a line a scheme."""
    names = accuracy_names(rows)
    heads = [
        "scheme",
        *names,
        "passes per image",
        "s per training step",
        "epochs",
        "passes in all (1000 batches)",
        "seeds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [figure_of(float(np.mean(row.accuracies(n))), deviation(row.accuracies(n))) for n in names]
        cells.append(f"{rounded(row.mean(forward), 1)} + {rounded(row.mean(backward), 1)}")
        cells.append(f"{row.mean(lambda line: line['seconds_per_update']):.3f}")
        cells += [f"{row.mean(lambda line: line['epochs']):g}", rounded(row.cost(), 2)]
        lines.append(f"| {row.scheme} | {' | '.join(cells)} | {len(row.lines)} |")
    return lines


def differences_table(rows: Sequence[Row], baseline: Row) -> list[str]:
    """Markdown: paired differences to the baseline, mean ± standard error, a line for each other scheme."""
    names = accuracy_names(rows)
    heads = [f"minus {baseline.scheme}", *names, "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        columns = [row.differences(baseline, name) for name in names]
        if row is not baseline and columns[0]:
            cells = [figure_of(float(np.mean(d)), deviation(d) / math.sqrt(len(d)), "+") for d in columns]
            lines.append(f"| {row.scheme} | {' | '.join(cells)} | {len(columns[0])} |")
    return lines


def table(title: str, rows: Sequence[Row], baseline: str, missing: Sequence[str]) -> str:
    """table.md: both tables, and what it takes to read them. missing: names of what is not finished."""
    lines = [line for row in rows for line in row.lines.values()]
    named = {row.scheme: row for row in rows}

    def different(name: str) -> str:
        return ", ".join(dict.fromkeys(str(line[name]) for line in lines))

    commits = dict.fromkeys(line[name][:12] for line in lines for name in ("commit", "eval_commit"))
    dates = sorted({line["date"][:10] for line in lines})
    text = [
        f"# {title}",
        f"{different('setting')}. Accuracy in % of the first {different('points')} test images, mean ± standard deviation over the seeds",
        "(which does not tell how much other test images would change it).",
        "",
        *results_table(rows),
        "",
        "Passes of the network per image, forward + backward, of attack and training step together. "
        f"Seconds on {different('device')}; jobs at once: {different('jobs')}, threads of each: {different('threads')}.",
        f"Commit {', '.join(commits)}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}.",
        "",
    ]
    if baseline not in named:
        text += [f"No differences: {baseline} is not finished.", ""]
    elif len(rows) > 1:
        text += ["Paired differences over the same seeds, in points, mean ± standard error over the seeds:", ""]
        text += [*differences_table(rows, named[baseline]), ""]
    shared = [flag for flag in lines[0]["train"] if all(flag in line["train"] for line in lines)]
    text += [f"`eval.py {shlex.join(lines[0]['eval'])}`; `train.py {shlex.join(shared)} --seed=SEED` and", ""]
    for row in rows:
        line = next(iter(row.lines.values()))
        own = shlex.join(flag for flag in line["train"] if flag not in shared)
        text.append(f"* {row.scheme} ({' '.join(line['norms'])}): " + (f"`{own}`" if own else "nothing else"))
    text += ["", f"**Not finished**: {', '.join(missing)}."] if missing else []
    if warnings := [f"* {line['scheme']}, seed {line['seed']}: {w}" for line in lines for w in line["warnings"]]:
        text += ["", "**Warnings of eval.py**:", "", *warnings]
    return "\n".join(text) + "\n"


def draw(rows: Sequence[Row]) -> Figure:
    """Union accuracy against what training cost, and against clean accuracy; a scheme of unknown cost is in the second alone."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    union = [float(np.mean(row.accuracies("union"))) for row in rows]
    panels: dict[Axes, list[float]] = {
        left: [row.cost() for row in rows],
        right: [float(np.mean(row.accuracies("clean"))) for row in rows],
    }
    shades = [COLOURS[number % len(COLOURS)] for number in range(len(rows))]  # names tell those of one colour apart
    for axes, across in panels.items():
        for row, x, y, shade in zip(rows, across, union, shades, strict=True):
            aside, up = row.spread("clean") if axes is right else 0.0, row.spread("union")
            axes.errorbar(x, y, up, aside, fmt="none", ecolor=shade, elinewidth=0.8, alpha=0.5)
            axes.plot(x, y, "o", color=shade, markersize=6)
    most = max((cost for cost in panels[left] if not math.isnan(cost)), default=1)
    left.set(xlabel="network passes in training, forward and backward (1000 batches)", xlim=(0, 1.15 * most))
    left.set(ylabel="accuracy on the union of the threats (%)")
    right.set(xlabel="clean accuracy (%)")
    settings = dict.fromkeys(line["setting"] for row in rows for line in row.lines.values())
    seeds = sorted({len(row.lines) for row in rows})
    how_many = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    of_one = "standard error over the test images"
    told = f"one seed, {of_one}" if seeds == [1] else f"mean and standard deviation of {how_many} seeds"
    told += f" (of one: {of_one})" if seeds[0] == 1 < seeds[-1] else ""
    figure.suptitle(f"{'; '.join(settings)}\n{told}", fontsize=9)
    figure.draw_without_rendering()  # from here on places in pixels are known
    for axes, across in panels.items():
        places = list(zip(across, union, strict=True))
        known = [number for number, (x, _) in enumerate(places) if not math.isnan(x)]
        pixels = [axes.transData.transform(places[number]) for number in known]
        taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
        for number in known:
            taken.append(write_beside(axes, places[number], rows[number].scheme, shades[number], taken))
    return figure


def write_report(
    title: str, rows: Sequence[Row], baseline: str, missing: Sequence[str], folder: Path, mark: str = ""
) -> None:
    """table.md, compare.png and compare.pdf, `mark` before the dots."""
    paths = [folder / name for name in (f"table{mark}.md", f"compare{mark}.png", f"compare{mark}.pdf")]
    text = table(title, rows, baseline, missing)
    paths[0].write_text(text, encoding="utf-8", errors="backslashreplace")
    with matplotlib.style.context(["default", STYLE]):
        figure = draw(rows)
        for path in paths[1:]:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    print(f"\n{text}\nwrote {', '.join(map(str, paths))}", flush=True)
