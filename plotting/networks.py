"""Networks side by side: clean against union accuracy, and accuracy in each norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting.comparison import Group, Outcomes, Result
from plotting.runs import Run, series
from plotting.style import GREY, colours, handle, in_order, write_labels
from utils.pictures import as_text

# Settings that have to be the same for two figures to stand side by side, besides data set, radii, attacks and number of images.
# With what each is if nothing is said of it.
SAME: dict[str, Any] = {"n_iter": 100, "n_restarts": None, "n_targets": None, "effort": None, "union_only": False}
SAME |= {"image_size": None, "class_order": "name"}


@dataclass(frozen=True)
class Point:
    """A trained network and what is known of its accuracy. Two compare only if their setting (data set, threats) is the same."""

    label: str
    group: str  # the label that those have which differ in their seed alone
    seed: int | None
    rows: dict[str, dict[str, float]]
    outcomes: dict[str, Outcomes]
    radii: dict[str, float]
    setting: str
    attacks: str
    averaged: bool  # EMA
    more: tuple[tuple[str, Any], ...]  # those of `SAME` in which it is not as usual

    @property
    def partial(self) -> bool:
        """Is it less than the standard evaluation?"""
        return self.attacks in ("fast", "quick") or bool(self.rows["union"].get("upper_bound"))


def points(runs: Sequence[Run]) -> Iterator[Point]:
    """The networks whose clean and union accuracy is known: from eval.json, else from the last quick evaluation."""
    for run in runs:
        for name, more in (("eval", ""), ("eval_ema", " EMA")):
            result, quick = run.files.get(f"{name}.json", {}), list(series(run, name, "test").values())
            rows, settings = result.get("accuracy", {}), result.get("settings", {})
            radii, attacks = {norm: about["eps"] for norm, about in result.get("norms", {}).items()}, "standard"
            if "union" not in rows and quick:
                rows, settings, attacks = quick[-1], run.files.get("config.json", {}), "quick"
                norms = [row for row in rows if row not in ("clean", "average", "union")]
                radii = dict(zip(norms, settings.get("eval_eps", []), strict=False))
            if "union" in rows:
                threats = ", ".join(f"{norm} {radii[norm]:.4g}" for norm in in_order(radii))
                setting = as_text(f"{settings.get('dataset')}: {threats}")
                outcomes = outcomes_of(result.get("outcomes", {}), list(radii))
                about: Any = (rows, outcomes, radii, setting, settings.get("attacks") or attacks, bool(more))
                about += (tuple((key, settings[key]) for key in SAME if settings.get(key, SAME[key]) != SAME[key]),)
                yield Point(run.label + more, run.group + more, run.seed, *about)


def outcomes_of(found: Mapping[str, Any], norms: Sequence[str]) -> dict[str, Outcomes]:
    """eval.json's, and with those of all norms their average, which it does not hold."""
    outcomes = {row: np.array(values) for row, values in found.items()}
    if norms and all(norm in outcomes for norm in norms):
        outcomes["average"] = np.mean([outcomes[norm] for norm in norms], 0)
    return outcomes


class Network(Group):
    """Points of one label, or of one group and setting."""

    def __init__(self, label: str, points: Sequence[Point]) -> None:
        self.points, first = points, points[0]
        self.setting, self.attacks, self.averaged, self.radii = (
            first.setting,
            first.attacks,
            first.averaged,
            first.radii,
        )
        self.partial = any(point.partial for point in points)
        self.bounded = any(row.get("upper_bound") for point in points for row in point.rows.values())
        seeds: list[int | str] = [f"{i}" if point.seed is None else point.seed for i, point in enumerate(points)]
        if len(set(seeds)) < len(seeds):
            seeds = [f"{i}" for i in range(len(points))]
        accuracies = [{name: row["accuracy"] for name, row in point.rows.items()} for point in points]
        numbers = [int(point.rows["clean"].get("points", 0)) for point in points]
        results = map(Result, accuracies, numbers, (point.outcomes for point in points))
        super().__init__(label, dict(zip(seeds, results, strict=True)))

    def interval(self, name: str) -> tuple[float, float, float]:
        """Accuracy and its ends: the 95 % interval; of several seeds the mean and a standard deviation each way."""
        if len(self.points) == 1:
            row = self.points[0].rows[name]
            return row["accuracy"], row["low"], row["high"]
        mean, deviation = self.accuracy(name)
        return mean, mean - deviation, mean + deviation

    def names(self) -> list[str]:
        """What there is a figure of in all of them."""
        return in_order(set.intersection(*(set(point.rows) for point in self.points)))

    @property
    def evaluation(self) -> tuple[str, int, str]:
        """What has to be the same for two to stand side by side: data set and threats, number of images, attacks and their settings."""
        more = "".join(f", {key} {value}" for key, value in self.points[0].more)
        return self.setting, max(result.points for result in self.results.values()), f"{self.attacks} attacks{more}"


def each_alone(found: Sequence[Point]) -> list[Network]:
    """A network for each point."""
    return [Network(point.label, [point]) for point in found]


def by_group(found: Sequence[Point]) -> list[Network]:
    """A network for all points of a group with the same evaluation."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in found:
        evaluation = Network(point.label, [point]).evaluation
        groups.setdefault((point.group, *evaluation), []).append(point)
    return [Network(same[0].group, same) for same in groups.values()]


def shades(networks: Sequence[Network], labels: Sequence[str]) -> list[Any]:
    """A colour for each: that of its label among all `labels`; averaged weights have that of the network they are of."""
    known = list(dict.fromkeys(labels))
    names = [network.label.removesuffix(" EMA") if network.averaged else network.label for network in networks]
    return [colours(len(known))[known.index(name)] for name in names]


def draw_tradeoff(networks: Sequence[Network], labels: Sequence[str]) -> Figure:
    """Clean against union accuracy, with `Network.interval`s; `labels`: of all that is drawn, here or elsewhere."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, settings = figure.subplots(), list(dict.fromkeys(network.setting for network in networks))
    for network, colour in zip(networks, shades(networks, labels), strict=True):
        (x, left, right), (y, low, high) = network.interval("clean"), network.interval("union")
        axes.hlines(y, left, right, colour, linewidth=0.8, alpha=0.5)
        axes.vlines(x, low, high, colour, linewidth=0.8, alpha=0.5)
        inside = "white" if network.partial else colour
        axes.plot(x, y, "D" if network.averaged else "o", color=colour, markerfacecolor=inside, markersize=6)
    axes.set(xlabel="clean accuracy (%)", ylabel="accuracy on the union of the threats (%)")
    axes.set_title(settings[0] if len(settings) == 1 else "settings differ: not comparable")
    figure.legend(handles=tradeoff_handles(networks), loc="outside lower center", ncols=4)
    figure.draw_without_rendering()  # from here on places in pixels are known
    places = [(network.interval("clean")[0], network.interval("union")[0]) for network in networks]
    texts = [each.label if len(settings) == 1 else f"{each.label}\n{each.setting}" for each in networks]
    write_labels(axes, places, texts, shades(networks, labels))
    return figure


def draw_bars(networks: Sequence[Network], labels: Sequence[str]) -> Figure:
    """Accuracy, clean, in each norm and the union, a bar for each network, with `Network.interval`s."""
    names = in_order(name for network in networks for name in network.names())
    figure = Figure(figsize=(1.5 + 0.25 * len(names) * (len(networks) + 1), 3.2), layout="constrained")
    axes, width = figure.subplots(), 1 / (len(networks) + 1)
    for number, (network, colour) in enumerate(zip(networks, shades(networks, labels), strict=True)):
        places = [place + (number + 1) * width for place, name in enumerate(names) if name in network.names()]
        values, lows, highs = zip(*map(network.interval, [n for n in names if n in network.names()]), strict=True)
        ends = np.array(values) - lows, np.array(highs) - values
        look: Any = {"hatch": "///", "edgecolor": "white"} if network.averaged else {}
        look |= {"label": network.label + " (upper bounds)" * network.bounded, "error_kw": {"linewidth": 0.8}}
        axes.bar(places, values, width, yerr=ends, color=colour, **look)
    axes.set_xticks(np.arange(len(names)) + 0.5, names)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100), title=networks[0].setting)
    if len({network.evaluation for network in networks}) > 1:
        axes.set_title("evaluations differ: not comparable")
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *interval_handles(networks)], loc="outside lower center", ncols=3)
    return figure


def tradeoff_handles(networks: Sequence[Network]) -> list[Line2D]:
    """What the marks mean that are there."""
    marks = (
        ("full evaluation", "o", GREY, [not network.partial for network in networks]),
        ("quick or fast attacks", "o", "white", [network.partial for network in networks]),
        ("EMA", "D", GREY, [network.averaged for network in networks]),
    )
    there = [handle(label, marker=m, markerfacecolor=c, linestyle="") for label, m, c, seen in marks if any(seen)]
    return [*there, *interval_handles(networks)]


def interval_handles(networks: Sequence[Network]) -> list[Line2D]:
    """What lines through marks and bars mean."""
    kinds = {len(network.points) > 1: network for network in networks}
    texts = {False: "95 % intervals", True: "standard deviation over seeds"}
    return [handle(texts[several], linewidth=0.8) for several in sorted(kinds)]
