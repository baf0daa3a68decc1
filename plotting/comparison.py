"""Networks that differ in their seed alone: means over seeds, and paired differences to others on the same images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.text import markdown as as_markdown

Outcomes = np.ndarray[Any, Any]  # (N,) in [0, 1], an image each


@dataclass(frozen=True)
class Result:
    """A network's accuracy in per cent on so many images, and the outcomes behind it where they are known; both by norm, clean, union."""

    accuracy: Mapping[str, float]
    points: int
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)


class Group:
    """The results of a network, by seed; text stands for a seed that is not known."""

    def __init__(self, label: str, results: Mapping[int | str, Result]) -> None:
        self.label, self.results = label, results

    def accuracy(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds, of which there are several."""
        values = [result.accuracy[name] for result in self.results.values()]
        return float(np.mean(values)), float(np.std(values, ddof=1))

    def estimate(self, name: str) -> tuple[float, float]:
        """Mean and `standard_error`. Where outcomes are not known, the error over images is an upper bound: that of one seed alone."""
        results = self.results.values()
        values = [result.accuracy[name] for result in results]
        mean = float(np.mean(values))
        images = [
            100.0 * each.outcomes.get(name, np.arange(each.points) < mean / 100 * each.points) for each in results
        ]
        return mean, standard_error(values, images)

    @property
    def unknown(self) -> bool:
        """Is it a single network whose seed is not known?"""
        return len(self.results) == 1 and isinstance(next(iter(self.results)), str)

    def pairs(self, other: Group) -> list[tuple[Result, Result]]:
        """Of the seeds that both have. A single network of no known seed is paired with all of the other's, as two single ones are."""
        ours, theirs = [*self.results.values()], [*other.results.values()]
        if len(ours) == len(theirs) == 1 or self.unknown or other.unknown:
            return [(one, two) for one in ours for two in theirs]
        return [(result, other.results[seed]) for seed, result in self.results.items() if seed in other.results]

    def difference(self, other: Group, name: str) -> tuple[float, float]:
        """To the other's accuracy, over all `pairs`, and its `standard_error`."""
        pairs = self.pairs(other)
        values = [ours.accuracy[name] - theirs.accuracy[name] for ours, theirs in pairs]
        known = [
            100.0 * (ours.outcomes[name] - 1.0 * theirs.outcomes[name])
            for ours, theirs in pairs
            if name in ours.outcomes and name in theirs.outcomes
        ]
        return float(np.mean(values)), standard_error(values, known if len(known) == len(values) else [])


def standard_error(seeds: Sequence[float], images: Sequence[Any]) -> float:
    """Of a mean, by its values over the seeds (S,), if there are several, and for each seed over its images (N,), if known.

    The two variances are added: other seeds and other images would both have changed it.
    """
    variance = float(np.var(seeds, ddof=1)) / len(seeds) if len(seeds) > 1 else 0.0
    if images:
        per_image = np.mean(images, 0)
        variance += float(np.var(per_image, ddof=1)) / len(per_image)
    return math.sqrt(variance) if len(seeds) > 1 or images else math.nan


def cell(value: tuple[float, float], sign: str = "") -> str:
    """Mean ± what is given with it, if that is known."""
    return f"{value[0]:{sign}.1f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.1f}")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first cell of each is a name, which is not read as markup."""
    lines = [[as_markdown(name), *cells] for name, *cells in (heads, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (lines[0], ["---"] * len(heads), *lines[1:])]


SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≤": r"$\leq$",
}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for LaTeX with the package booktabs."""

    def escaped(text: str) -> str:
        """As text: a negative number has a minus, -- is no dash, and no * or [ is read with the end of the line before."""
        minus, rest = re.fullmatch(r"(-(?=\d))?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        words = "".join(SPECIAL.get(c, c) for c in rest).replace("--", "-{}-").replace("--", "-{}-")
        return "$-$" * bool(minus) + "{}" * words.startswith(("*", "[")) + words

    def line(row: Sequence[str]) -> str:
        return " & ".join(map(escaped, row)) + r" \\"

    columns = "l" + "r" * (len(heads) - 1)
    begin = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(heads), r"\midrule"]
    return [*begin, *map(line, rows), r"\bottomrule", r"\end{tabular}"]
