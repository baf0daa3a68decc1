"""Networks side by side: clean against union accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from plotting.runs import Run, series
from plotting.style import GREY, colours, handle, in_order, write_beside
from utils.pictures import as_text


@dataclass(frozen=True)
class Point:
    """A network in the second picture. Two compare only if their setting (data set, threats) is the same."""

    run: int
    label: str
    rows: dict[str, dict[str, float]]
    setting: str
    partial: bool  # not all attacks were made
    averaged: bool  # EMA


def points(runs: Sequence[Run]) -> Iterator[Point]:
    """The networks whose clean and union accuracy is known: from eval.json, else from the last quick evaluation."""
    for number, run in enumerate(runs):
        for name, more in (("eval", ""), ("eval_ema", " EMA")):
            result, quick = run.files.get(f"{name}.json", {}), list(series(run, name, "test").values())
            rows, settings = result.get("accuracy", {}), result.get("settings", {})
            radii = {norm: about["eps"] for norm, about in result.get("norms", {}).items()}
            partial = settings.get("attacks") in ("fast", "quick") or bool(rows.get("union", {}).get("upper_bound"))
            if "union" not in rows and quick:
                rows, settings, partial = quick[-1], run.files.get("config.json", {}), True
                norms = [row for row in rows if row not in ("clean", "average", "union")]
                radii = dict(zip(norms, settings.get("eval_eps", []), strict=False))
            if "union" in rows:
                threats = ", ".join(f"{norm} {radii[norm]:.4g}" for norm in in_order(radii))
                setting = as_text(f"{settings.get('dataset')}: {threats}")
                yield Point(number, run.label + more, rows, setting, partial, bool(more))


def draw_tradeoff(found: Sequence[Point], number: int) -> Figure:
    """Clean against union accuracy with 95 % intervals; `number` runs in all."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, shades = figure.subplots(), colours(number)
    settings = list(dict.fromkeys(point.setting for point in found))
    places = [(point.rows["clean"]["accuracy"], point.rows["union"]["accuracy"]) for point in found]
    for point, (x, y) in zip(found, places, strict=True):
        colour, clean, union = shades[point.run], point.rows["clean"], point.rows["union"]
        axes.hlines(y, clean["low"], clean["high"], colour, linewidth=0.8, alpha=0.5)
        axes.vlines(x, union["low"], union["high"], colour, linewidth=0.8, alpha=0.5)
        inside = "white" if point.partial else colour
        axes.plot(x, y, "D" if point.averaged else "o", color=colour, markerfacecolor=inside, markersize=6)
    axes.set(xlabel="clean accuracy (%)", ylabel="accuracy on the union of the threats (%)")
    axes.set_title(settings[0] if len(settings) == 1 else "settings differ: not comparable")
    figure.legend(handles=tradeoff_handles(found), loc="outside lower center", ncols=4)
    figure.draw_without_rendering()  # from here on places in pixels are known
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(places)]
    for point, place in zip(found, places, strict=True):
        text = point.label if len(settings) == 1 else f"{point.label}\n{point.setting}"
        taken.append(write_beside(axes, place, text, shades[point.run], taken))
    return figure


def tradeoff_handles(found: Sequence[Point]) -> list[Line2D]:
    """What the marks mean that are there."""
    marks = (
        ("full evaluation", "o", GREY, [not point.partial for point in found]),
        ("quick or fast attacks", "o", "white", [point.partial for point in found]),
        ("EMA", "D", GREY, [point.averaged for point in found]),
    )
    there = [handle(label, marker=m, markerfacecolor=c, linestyle="") for label, m, c, seen in marks if any(seen)]
    return [*there, handle("95 % intervals", linewidth=0.8)]
