"""Pictures of runs, as PNG and PDF: training over epochs, and clean against union accuracy.

python plot.py runs/RUN                                               one run, pictures in its folder
python plot.py runs/A runs/B results/C --labels='E-AT Linf start'     side by side, pictures in ./plots

RUN is a run folder of train.py, which may still be training, or a result folder of eval.py (second picture only).
A hollow point of the second picture is less than the standard evaluation: the run's last --eval_freq, --attacks=quick or fast.
EMA: averaged weights, where a run has figures of theirs (eval_ema). Bands (test images of a single run) and bars are 95 % intervals.
"""

from __future__ import annotations

import utils.installed  # noqa: F401

# isort: split

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from utils.cli import Parser, UsageError, add_flag, blame, usage_errors, words
from utils.pictures import as_text
from utils.run_folder import parse_json, read_json

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
RESULTS = ("eval.json", "eval_ema.json")


@dataclass(frozen=True)
class Run:
    """What a folder holds; without records it is a result of eval.py."""

    label: str
    records: list[dict[str, Any]]  # an epoch each
    files: dict[str, dict[str, Any]]  # content of config.json and RESULTS, where there


@dataclass(frozen=True)
class Curve:
    """A line of the first picture; each dict has values by epoch."""

    run: int
    panel: str
    row: str
    points: dict[int, float]
    kind: str = ""  # one of KINDS, in accuracy panels
    band: Sequence[dict[int, float]] = ()  # lower and upper ends of 95 % intervals


@dataclass(frozen=True)
class Point:
    """A network in the second picture. Two compare only if their setting (data set, threats) is the same."""

    run: int
    label: str
    rows: dict[str, dict[str, float]]
    setting: str
    partial: bool  # not all attacks were made
    averaged: bool  # EMA


def read_run(folder: Path, label: str) -> Run:
    """Raises ValueError or OSError if it is no folder, has nothing to draw or holds a damaged file."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = [folder / name for name in ("config.json", *RESULTS)]
    files = {path.name: read_json(path) for path in paths if path.exists()}
    metrics = folder / "metrics.jsonl"
    records = read_records(metrics) if metrics.exists() else []
    if not records and "eval.json" not in files:
        raise ValueError(f"{folder} has neither eval.json nor a metrics.jsonl with a finished epoch")
    return Run(as_text(label), records, files)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The epochs of a metrics.jsonl, but for a torn last line: the run is writing it. Raises ValueError."""
    records: list[dict[str, Any]] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON") from error
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            raise ValueError(f"{path}, line {number} is no epoch of train.py")
        records.append(record)
    return records


def short_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names; of several, without the _-separated words that all share, if they still differ then."""
    names = [folder.resolve().name for folder in folders]
    if len(names) == 1:
        return names
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    shared = set.intersection(*(set(name.split("_")) for name in names))
    short = ["_".join(word for word in name.split("_") if word not in shared) for name in names]
    return short if all(short) and len(set(short)) == len(short) else names


def series(run: Run, *path: str) -> dict[int, Any]:
    """What the records have there, by epoch, without what is null or missing."""
    found = {}
    for record in run.records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[record["epoch"]] = value
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Each once, as in PANELS and ROWS, others behind."""
    order = [*PANELS, *ROWS]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))


def curves(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """The lines of each panel of the first picture that has any, in the order of the panels."""
    found: dict[str, list[Curve]] = {}
    for number, run in enumerate(runs):
        for curve in (*training_curves(number, run), *accuracy_curves(number, run)):
            found.setdefault(curve.panel, []).append(curve)
    return {panel: found[panel] for panel in in_order(found)}


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


def colours(number: int) -> list[Any]:
    """So many, all different."""
    viridis = matplotlib.colormaps["viridis"]
    return COLOURS[:number] if number <= len(COLOURS) else [viridis(i / (number - 1)) for i in range(number)]


def handle(label: str, **look: Any) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], label=label, **{"color": GREY} | look)


def draw_training(runs: Sequence[Run]) -> Figure:
    """Panels over epochs. Colours are runs and markers norms; of a single run, colours are norms too."""
    panels = curves(runs)
    training = [name for name in panels if name in PANELS]
    groups = [names for names in (training, list(panels)[len(training) :]) if names]
    heights = [0.5 + 2 * math.ceil(len(names) / 3) for names in groups]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    shades = colours(len(runs)) if len(runs) > 1 else []
    for part, names in zip(parts, groups, strict=True):
        for axes, name in zip_longest(part.subplots(math.ceil(len(names) / 3), 3, squeeze=False).flat, names):
            draw_panel(axes, panels.get(name, []), shades)
        drawn = [curve for name in names for curve in panels[name]]
        draw_legend(part, drawn, shades, runs if names is groups[0] else [])
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
    if curve.kind == "test images" and not shades:
        low, high = (list(end.values()) for end in curve.band)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_legend(part: SubFigure, drawn: Sequence[Curve], shades: Sequence[Any], runs: Sequence[Run]) -> None:
    """These runs' colours, and what markers (training) or lines (accuracy) mean; their colours too unless they mean runs."""
    handles = [handle(run.label, color=c, linewidth=3) for run, c in zip(runs, shades, strict=False) if run.records]
    for row in in_order(curve.row for curve in drawn if not curve.kind):
        marker, colour = ROWS.get(row, OTHER)
        handles.append(handle(row, marker=marker, color=GREY if shades else colour))
    kinds = {curve.kind for curve in drawn}
    for kind in [kind for kind in KINDS if kind in kinds]:
        inside = "white" if "EMA" in kind else GREY
        handles.append(handle(kind, linestyle=KINDS[kind][2], marker="o", markerfacecolor=inside))
    if "test images" in kinds and not shades:
        handles.append(handle("95 % interval, test images", alpha=0.2, linewidth=8))
    longest = max(len(str(each.get_label())) for each in handles)
    columns = max(1, min(len(handles), 120 // (longest + 8)))
    part.legend(handles=handles, loc="outside lower center", ncols=columns)


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


def write_beside(axes: Axes, place: tuple[float, float], text: str, colour: Any, taken: Sequence[Bbox]) -> Bbox:
    """A label where it covers fewest taken boxes, as near to the place as can be; its box in pixels."""
    label = axes.annotate(text, place, (0, 0), textcoords="offset points", fontsize=7, color=colour)
    label.set(in_layout=False, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.2, "linewidth": 0})

    def covered(spot: tuple[int, int]) -> int:
        side, up = spot
        label.set(position=(7 * side, 9 * up + 3), horizontalalignment="left" if side > 0 else "right")
        box = label.get_window_extent()
        return box.count_overlaps(taken) + 100 * (box.x0 < axes.bbox.x0 or box.x1 > axes.figure.bbox.x1)

    covered(min([(side, up) for up in (0, -1, 1, -2, 2, -3, 3, -4, 4) for side in (1, -1)], key=covered))
    return label.get_window_extent()


def make_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(prog="plot.py", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of train.py or eval.py (needed)")
    add_flag(parser, "--save_dir", type=Path, help="folder of the pictures (that of a single RUN, else ./plots)")
    add_flag(parser, "--labels", type=words, help="a name for each RUN, blanks between (how the folders' names differ)")
    return parser


@usage_errors("plot.py")
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Read, draw, save; the files written."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with blame("RUN"):
        labels = args.labels or short_labels(args.runs)
    if len(labels) != len(args.runs):
        parser.error(f"argument --labels: one for each RUN is needed, {len(args.runs)}; got {len(labels)}")
    with blame("RUN"):
        runs = [read_run(folder, label) for folder, label in zip(args.runs, labels, strict=True)]
    with matplotlib.style.context(["default", STYLE]):
        try:
            found = list(points(runs))
            figures = {"training": draw_training(runs)} if any(run.records for run in runs) else {}
            figures |= {"tradeoff": draw_tradeoff(found, len(runs))} if found else {}
            tell(runs, found)
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, OverflowError) as error:
            text = "a file there holds what train.py and eval.py do not write"
            raise UsageError("RUN", f"{text} ({type(error).__name__}: {error})") from error
        if not figures:
            parser.error("argument RUN: there are neither epochs nor a union accuracy to draw")
        with blame("--save_dir"):
            return save(figures, args.save_dir or (args.runs[0] if len(runs) == 1 else Path("plots")))


def tell(runs: Sequence[Run], found: Sequence[Point]) -> None:
    """Print which runs are not in the second picture, and what eval.py warned of."""
    drawn = {point.run for point in found}
    if without := [run.label for number, run in enumerate(runs) if number not in drawn]:
        print(f"not in tradeoff, no union accuracy (train.py --eval_freq or --final_eval): {', '.join(without)}")
    for run in runs:
        for name in RESULTS:
            for text in run.files.get(name, {}).get("warnings", []):
                print(f"WARNING: {run.label}: {text}")


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and PDF to the folder; the files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for end, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            written.append(folder / f"{name}.{end}")
            figure.savefig(written[-1], metadata=metadata)
            print(f"wrote {written[-1]}")
    return written


if __name__ == "__main__":
    main()
