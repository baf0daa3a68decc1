"""How pictures look: colours, markers, and labels that cover nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType: text stays text
    "text.parse_math": False,  # a dollar in a label is a dollar
}
# Okabe and Ito's colours, which colour-blind people can tell apart; not their yellow, which is hard to see on white.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
ALL = "all batches"
ROWS = {  # what a line is about: its marker and, in the picture of a single run, its colour
    ALL: (".", "#000000"),
    "clean": ("o", "#009e73"),
    "Linf": ("s", "#0072b2"),
    "L2": ("D", "#e69f00"),
    "L1": ("^", "#d55e00"),
    "average": ("P", "#56b4e9"),
    "union": ("v", "#cc79a7"),
}
OTHER = ("X", "#666666")  # a norm that is not among them
GREY = "0.3"  # in legends, where colours mean something else


def in_order(names: Iterable[str]) -> list[str]:
    """Each once, as in ROWS, others behind."""
    order = [*ROWS]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))


def colours(number: int) -> list[Any]:
    """So many, all different."""
    viridis = matplotlib.colormaps["viridis"]
    return COLOURS[:number] if number <= len(COLOURS) else [viridis(i / (number - 1)) for i in range(number)]


def handle(label: str, **look: Any) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], label=label, **{"color": GREY} | look)


def write_beside(axes: Axes, place: tuple[float, float], text: str, colour: Any, taken: Sequence[Bbox]) -> Bbox:
    """A label where it covers fewest taken boxes, as near to the place as can be; its box in pixels."""
    label = axes.annotate(text, place, (0, 0), textcoords="offset points", fontsize=7, color=colour)
    label.set(in_layout=False, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.2, "linewidth": 0})

    def covered(spot: tuple[int, int]) -> int:
        side, up = spot
        label.set(position=(7 * side, 9 * up + 3), horizontalalignment="left" if side > 0 else "right")
        box = label.get_window_extent()
        return box.count_overlaps(taken) + 100 * (box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1)

    covered(min([(side, up) for up in (0, -1, 1, -2, 2, -3, 3, -4, 4) for side in (1, -1)], key=covered))
    return label.get_window_extent()


def write_labels(
    axes: Axes, places: Sequence[tuple[float, float]], texts: Sequence[str], shades: Sequence[Any]
) -> None:
    """A label beside each point, over none of the others. The figure has been laid out: places in pixels are known."""
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(places)]
    for place, text, colour in zip(places, texts, shades, strict=True):
        taken.append(write_beside(axes, place, text, colour, taken))
