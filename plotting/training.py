"""The picture of training: a panel for each quantity, over epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, zip_longest
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from plotting.runs import Run, series
from plotting.style import ALL, GREY, OTHER, ROWS, colours, handle, in_order

PANELS = {  # of training: label of the y axis, key in a record and in its norms' rows, factor
    "training loss": ("cross-entropy (nats)", "loss", 1),
    "training error": ("error (%)", "error", 100),
    "learning rate": ("learning rate", "lr", 1),
    "running error": ("error so far (%)", "running_error", 100),
    "draw frequency": ("share of images (%)", "drawn", 100),
}
KINDS: dict[str, tuple[str, str, Any]] = {  # lines of an accuracy panel: where a record has them, line style
    "test images": ("eval", "test", "-"),
    "training images": ("eval", "train", "--"),
    "test images, EMA": ("eval_ema", "test", "-."),
    "training images, EMA": ("eval_ema", "train", ":"),
    "held-out images": ("eval", "val", (0, (5, 1))),
    "held-out images, EMA": ("eval_ema", "val", (0, (5, 1, 1, 1))),
}


@dataclass(frozen=True)
class Curve:
    """A line of the first picture; each dict has values by epoch."""

    run: int
    panel: str
    row: str
    points: dict[int, float]
    kind: str = ""  # one of KINDS, in accuracy panels
    band: Sequence[dict[int, float]] = ()  # lower and upper ends: of 95 % intervals, or a standard deviation over seeds
    seeds: int = 1


def curves(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """The lines of each panel of the first picture that has any, in the order of the panels."""
    found: dict[str, list[Curve]] = {}
    for number, run in enumerate(runs):
        for curve in (*training_curves(number, run), *accuracy_curves(number, run)):
            found.setdefault(curve.panel, []).append(curve)
    order = [*PANELS, *in_order(found)]
    return {panel: found[panel] for panel in dict.fromkeys(order) if panel in found}


def training_curves(number: int, run: Run) -> Iterator[Curve]:
    """The lines of PANELS; a run of a single norm has no second line of all batches, and no draw frequency."""
    norms = dict.fromkeys(chain(*series(run, "norms").values()))
    for panel, (_, key, factor) in PANELS.items():
        paths = {ALL: [key]} | {norm: ["norms", norm, key] for norm in norms}
        if len(norms) == 1 and key != "lr":
            del paths[ALL]
        for row, path in paths.items():
            points = {epoch: factor * value for epoch, value in series(run, *path).items()}
            if key == "running_error":  # it begins as 1, without a meaning, until the norm is first drawn
                first = min(series(run, "norms", row, "loss"), default=math.inf)
                points = {epoch: value for epoch, value in points.items() if epoch >= first}
            if points and not (key == "drawn" and len(norms) == 1):
                yield Curve(number, panel, row, points)


def accuracy_curves(number: int, run: Run) -> Iterator[Curve]:
    """One of each of KINDS for each row of the quick evaluations."""
    for kind, (name, split, _) in KINDS.items():
        for row in dict.fromkeys(chain(*series(run, name, split).values())):
            points, *band = (series(run, name, split, row, key) for key in ("accuracy", "low", "high"))
            if points:
                yield Curve(number, row, row, points, kind, band)


def banded(panels: dict[str, list[Curve]], runs: Sequence[Run], groups: Sequence[str]) -> dict[str, list[Curve]]:
    """Curves of runs of one group as one: the mean over the epochs that all have, and a standard deviation each way."""
    found: dict[str, list[Curve]] = {}
    for panel, drawn in panels.items():
        same: dict[tuple[int, str, str], list[Curve]] = {}
        for curve in drawn:
            same.setdefault((groups.index(runs[curve.run].group), curve.row, curve.kind), []).append(curve)
        found[panel] = [mean_curve(number, each) for (number, *_), each in same.items()]
    return {panel: kept for panel, drawn in found.items() if (kept := [curve for curve in drawn if curve.points])}


def mean_curve(number: int, each: Sequence[Curve]) -> Curve:
    """One curve of several, of run `number`."""
    epochs = sorted(set.intersection(*(set(curve.points) for curve in each)))
    values = {epoch: [curve.points[epoch] for curve in each] for epoch in epochs}
    points = {epoch: float(np.mean(several)) for epoch, several in values.items()}
    if len(each) == 1:
        return replace(each[0], run=number, band=())
    spread = {epoch: float(np.std(several, ddof=1)) for epoch, several in values.items()}
    band = [{epoch: points[epoch] + sign * spread[epoch] for epoch in epochs} for sign in (-1, 1)]
    return replace(each[0], run=number, points=points, band=band, seeds=len(each))


def panel_names(runs: Sequence[Run]) -> dict[str, str]:
    """The panels that there are, by their names on the command line: training-loss for training loss."""
    return {name.replace(" ", "-"): name for name in curves(runs)}


def chosen_curves(runs: Sequence[Run], chosen: Sequence[str], bands: bool) -> tuple[dict[str, list[Curve]], list[str]]:
    """The curves of the chosen panels (all if there are none), and the labels of what they number: runs, with `bands` groups."""
    panels, labels = curves(runs), [run.label for run in runs]
    if bands:
        labels = list(dict.fromkeys(run.group for run in runs))
        panels = banded(panels, runs, labels)
    return {name: panels[name] for name in panels if name in (chosen or panels)}, labels


def draw_training(runs: Sequence[Run], chosen: Sequence[str] = (), bands: bool = False) -> Figure:
    """Panels over epochs (`chosen_curves`). Colours are runs or groups, and markers norms; of a single one, colours are norms too."""
    panels, labels = chosen_curves(runs, chosen, bands)
    groups = [list(names) for _, names in groupby(panels, PANELS.__contains__)]  # training, then accuracy
    columns = min(3, max(map(len, groups)))
    heights = [0.5 + 2 * math.ceil(len(names) / columns) for names in groups]
    figure = Figure(figsize=(max(3 * columns, 5), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    shades = colours(len(labels)) if len(labels) > 1 else []
    for part, names in zip(parts, groups, strict=True):
        places = part.subplots(math.ceil(len(names) / columns), columns, squeeze=False)
        for axes, name in zip_longest(places.flat, names):
            draw_panel(axes, panels.get(name, []), shades)
        drawn = [curve for name in names for curve in panels[name]]
        draw_legend(part, drawn, shades, labels if names is groups[0] else [])
    epochs = list(chain(*(curve.points for curve in chain(*panels.values()))))
    for axes in figure.axes:
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    return figure


def draw_panel(axes: Axes, drawn: Sequence[Curve], shades: Sequence[Any]) -> None:
    """One line a curve, or nothing; without shades, one for each run, a row has its own colour, and test images a band."""
    if not drawn:
        axes.set_axis_off()
        return
    name = drawn[0].panel
    accuracy = f"accuracy, {name}" if name == "clean" else f"accuracy, {name} (--eval_freq)"
    title, label = (name, PANELS[name][0]) if name in PANELS else (accuracy, "accuracy (%)")
    axes.set(title=title, xlabel="epoch", ylabel=label)
    for curve in drawn:
        draw_curve(axes, curve, shades)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if name == "learning rate":
        rates = [rate for curve in drawn for rate in curve.points.values() if rate > 0] or [1]
        axes.set(yscale="log", ylim=(min(rates) / 2, max(rates) * 2))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def draw_curve(axes: Axes, curve: Curve, shades: Sequence[Any]) -> None:
    """One line, and a band if it may have one."""
    marker, colour = ROWS.get(curve.row, OTHER)
    width = 2 if curve.row == ALL else 1.2
    if shades:
        colour = shades[curve.run]
        if curve.panel == "learning rate":  # often the same in all runs: thinner and thinner, so that all are seen
            width = 5 - 3.8 * curve.run / (len(shades) - 1)
    look: dict[str, Any] = {"marker": marker, "markevery": 1 + len(curve.points) // 20, "linewidth": width}
    look |= {"linestyle": KINDS[curve.kind][2] if curve.kind else "-", "color": colour}
    look["markerfacecolor"] = "white" if "EMA" in curve.kind else colour
    epochs = list(curve.points)
    axes.plot(epochs, list(curve.points.values()), **look)
    if curve.seeds > 1 or (curve.kind == "test images" and curve.band and not shades):
        low, high = (list(end.values()) for end in curve.band)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_legend(part: SubFigure, drawn: Sequence[Curve], shades: Sequence[Any], labels: Sequence[str]) -> None:
    """Colours of the labels that have curves, and what markers (training) or lines (accuracy) mean; colours too unless they mean runs."""
    there = {curve.run for curve in drawn}
    named = enumerate(zip(labels, shades, strict=False))
    handles = [handle(label, color=colour, linewidth=3) for number, (label, colour) in named if number in there]
    for row in in_order(curve.row for curve in drawn if not curve.kind):
        marker, colour = ROWS.get(row, OTHER)
        handles.append(handle(row, marker=marker, color=GREY if shades else colour))
    handles += kind_handles(drawn, bool(shades))
    longest = max(len(str(each.get_label())) for each in handles)
    columns = max(1, min(len(handles), 120 // (longest + 8)))
    part.legend(handles=handles, loc="outside lower center", ncols=columns)


def kind_handles(drawn: Sequence[Curve], shaded: bool) -> list[Line2D]:
    """What line styles and bands mean; `shaded`: colours are runs."""
    kinds = {curve.kind for curve in drawn}
    looks = [(kind, KINDS[kind][2], "white" if "EMA" in kind else GREY) for kind in KINDS if kind in kinds]
    handles = [handle(kind, linestyle=style, marker="o", markerfacecolor=inside) for kind, style, inside in looks]
    if any(curve.seeds > 1 for curve in drawn):
        return [*handles, handle("standard deviation over seeds", alpha=0.2, linewidth=8)]
    if not shaded and any(curve.kind == "test images" and curve.band for curve in drawn):
        handles.append(handle("95 % interval, test images", alpha=0.2, linewidth=8))
    return handles
