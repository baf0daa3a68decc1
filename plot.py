"""Pictures and tables of runs: training over epochs, clean against union accuracy, accuracy in each norm.

python plot.py runs/RUN                                               one run, pictures in its folder
python plot.py runs/A runs/B results/C --labels='E-AT Linf start'     side by side, pictures in ./plots
python plot.py runs/* --bands --panels='training-loss union'          seeds of one run as one line; some panels alone
python plot.py results/* --table=latex --baseline=E-AT --bars         for a paper

RUN is a run folder of train.py, which may still be training, or a result folder of eval.py (no picture of training).
A hollow point is less than the standard evaluation: the run's last --eval_freq, --attacks=quick or fast.
EMA: averaged weights, where a run has figures of theirs (eval_ema). Tables and bars, with --bands the other pictures too, put runs together
whose folders' names differ in the seed alone, or that have the same label: mean and standard deviation over them. Else bands (test images
of a single run) and lines through points and bars are 95 % intervals.
"""

from __future__ import annotations

import utils.installed  # noqa: F401

# isort: split

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from plotting.networks import Point, by_group, draw_bars, draw_tradeoff, each_alone, points
from plotting.runs import RESULTS, Run, read_runs
from plotting.style import STYLE
from plotting.tables import KINDS, tables
from plotting.training import draw_training, panel_names
from utils.cli import Parser, UsageError, add_flag, blame, usage_errors, words


def make_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(prog="plot.py", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of train.py or eval.py (needed)")
    add_flag(parser, "--save_dir", type=Path, help="folder of the pictures (that of a single RUN, else ./plots)")
    add_flag(parser, "--labels", type=words, help="a name for each RUN, blanks between (how the folders' names differ)")
    add_flag(
        parser, "--panels", type=words, help="of the picture of training these alone, such as training-loss union (all)"
    )
    add_flag(parser, "--bands", action="store_true", help="seeds of one run as one, with a standard deviation (off)")
    add_flag(parser, "--bars", action="store_true", help="also a picture of accuracy in each norm, in bars (off)")
    add_flag(parser, "--table", choices=KINDS, help="also a table, printed and saved (none)")
    add_flag(parser, "--baseline", help="label of the network to which --table gives paired differences (none)")
    return parser


@usage_errors("plot.py")
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Read, draw, save; the files written."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.runs):
        parser.error(f"argument --labels: one for each RUN is needed, {len(args.runs)}; got {len(args.labels)}")
    with blame("RUN"):
        runs = read_runs(args.runs, args.labels)
    folder = args.save_dir or (args.runs[0] if len(runs) == 1 else Path("plots"))
    with matplotlib.style.context(["default", STYLE]):
        try:
            figures, text = drawn(runs, args)
        except UsageError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, OverflowError) as error:
            what = "a file there holds what train.py and eval.py do not write"
            raise UsageError("RUN", f"{what} ({type(error).__name__}: {error})") from error
        if not figures:
            parser.error("argument RUN: there are neither epochs nor a union accuracy to draw")
        with blame("--save_dir"):
            return save(figures, folder) + (save_table(text, folder, args.table) if text else [])


def drawn(runs: Sequence[Run], args: Namespace) -> tuple[dict[str, Figure], str]:
    """The pictures by name, and the text of --table. Raises UsageError for names that no run has."""
    found = list(points(runs))
    groups = by_group(found)
    check(runs, args, [network.label for network in groups])
    figures: dict[str, Figure] = {}
    if any(run.records for run in runs):
        figures["training"] = draw_training(runs, chosen_panels(runs, args.panels), args.bands)
    if found:
        labels = [run.group if args.bands else run.label for run in runs]
        figures["tradeoff"] = draw_tradeoff(groups if args.bands else each_alone(found), labels)
    if args.bars:
        figures["bars"] = draw_bars(groups, [run.group for run in runs])
    tell(runs, found)
    return figures, tables(groups, args.table, args.baseline) if args.table else ""


def check(runs: Sequence[Run], args: Namespace, networks: Sequence[str]) -> None:
    """Raises UsageError for flags that these runs, with networks of these labels, have nothing for."""
    for name in ("bars", "table"):
        if getattr(args, name) and not networks:
            raise UsageError(f"--{name}", "no run has a union accuracy (train.py --final_eval, eval.py)")
    if args.panels and not any(run.records for run in runs):
        raise UsageError("--panels", "these runs have no epochs")
    if args.baseline and not args.table:
        raise UsageError("--baseline", "it is for --table=markdown or latex, add that")
    if args.baseline and args.baseline not in networks:
        raise UsageError("--baseline", f"{args.baseline!r} is none of the networks, {' '.join(map(repr, networks))}")


def chosen_panels(runs: Sequence[Run], asked: Sequence[str] | None) -> list[str]:
    """Their full names. Raises UsageError for one that there is not."""
    known = panel_names(runs)
    if unknown := [name for name in asked or () if name not in known]:
        raise UsageError("--panels", f"{' '.join(unknown)} not among the panels, {' '.join(known)}")
    return [known[name] for name in asked or ()]


def tell(runs: Sequence[Run], found: Sequence[Point]) -> None:
    """Print which runs are not in the second picture, and what eval.py warned of."""
    there = {point.label for point in found}
    if without := [run.label for run in runs if run.label not in there]:
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


def save_table(text: str, folder: Path, kind: str) -> list[Path]:
    """Print it, and write it to table.md or table.tex; the file. Raises OSError."""
    path = folder / f"table.{KINDS[kind][1]}"
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}\n\n{text}")
    return [path]


if __name__ == "__main__":
    main()
