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

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from plotting.networks import Point, draw_tradeoff, points
from plotting.runs import RESULTS, Run, read_run, short_labels
from plotting.style import STYLE
from plotting.training import draw_training
from utils.cli import Parser, UsageError, add_flag, blame, usage_errors, words


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
