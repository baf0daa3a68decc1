"""Ways to train for several norms side by side: each with the same seeds, evaluated on the same images; a table and a picture.

python benchmarks/compare_schemes.py digits                                             a study: one of STUDIES below
python benchmarks/compare_schemes.py digits mine='--multinorm=ramp --ramp_lambda=1'     a scheme of one's own beside the study's
python benchmarks/compare_schemes.py digits mine='--lr-max=0.2' --only=mine             it and the baseline alone
python benchmarks/compare_schemes.py digits --seeds='0 1' --train=--epochs=3 --eval='--n_ex=50 --attacks=fast'      smaller
python benchmarks/compare_schemes.py cifar10-finetune --data_dir=DIR --model_dir=DIR --train=--epochs=1
python benchmarks/compare_schemes.py my-study eat max --train='--dataset=digits --attack=apgd --epochs=5'     none of STUDIES

A scheme is NAME='flags of train.py', which go behind the study's and --train's; NAME alone is one of SCHEMES below, else --multinorm=NAME.
With --ema it is the averaged weights that are evaluated. Jobs are done one after the other; for several at once start it several times,
with other --seeds or --only. What is finished is not done again: after any end, or with more schemes or seeds, the same command goes on.
A job that fails does not end the others; it is told at the end, and the exit code is 1.

In SAVE_DIR/STUDY: runs/ and start/ (train.py's folders), results/ (eval.py's), results.jsonl (a line for each scheme and seed that is
finished), table.md, compare.png and compare.pdf: of what was asked for.
"""

from __future__ import annotations

import re
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from io import StringIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

import eval as eval_script
import train
from benchmarks.scheme_report import Line, Row, packed, write_report
from config import Config, EvalConfig, TrainConfig, checked_eval, flags_given, resolved
from config import make_parser as make_script_parser
from data import number_of_batches
from plotting.runs import read_records
from utils.cli import Parser, UsageError, add_flag, between, blame, usage_errors, words
from utils.run_folder import append_json_line, json_lines, read_json


@dataclass(frozen=True)
class Study:
    """What its schemes share. Flags are written as in a shell, lists with blanks."""

    train: str = ""  # flags of train.py
    evaluation: str = ""  # flags of eval.py
    schemes: dict[str, str] = field(default_factory=dict)  # flags of train.py, by name
    seeds: tuple[int, ...] = (0,)
    start: str = ""  # flags of train.py for a network that is trained first, and that every scheme fine-tunes


SCHEMES = {  # others are --multinorm=NAME
    "trades": "--multinorm=eat --loss=trades",
    "L1": "--l_norms=L1",
    "ramp-gp": "--multinorm=ramp --gradient_projection",  # all of the paper's; an epoch has two halves, of which one is natural
    "ramp5": "--multinorm=ramp --at_iter=5",  # two attacks of half the steps cost little more than one
    "ramp37": "--multinorm=ramp --l_norms='Linf L1' --l_iters='3 7'",  # the same, more steps where they are needed
    "max5": "--multinorm=max --l_norms='Linf L1' --at_iter=5",
    "max37-trades": "--multinorm=max --l_norms='Linf L1' --l_iters='3 7' --loss=trades",  # the highest union on digits
    "label-smoothing": "--multinorm=eat --label_smoothing=0.1",
    "awp": "--multinorm=eat --awp=0.005",
    "adamw": "--multinorm=eat --optimizer=adamw --lr-max=0.003 --weight_decay=0.05",
    "cosine": "--multinorm=eat --lr-schedule=cosine",
    "max37-trades-awp": "--multinorm=max --l_norms='Linf L1' --l_iters='3 7' --loss=trades --awp=0.005",
}


def scheme(text: str) -> tuple[str, str]:
    """NAME and its flags, of NAME='flags' or of NAME alone."""
    name, given, flags = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise ArgumentTypeError(f"give NAME or NAME='flags', NAME of letters, digits and . _ + -, not {text!r}")
    return name, flags if given else SCHEMES.get(name, f"--multinorm={name}")


def schemes(text: str) -> dict[str, str]:
    """Names with blanks between, and their flags."""
    return dict(map(scheme, text.split()))


# --l_norms is left out: each has those of its paper, L2 among them or not. --train="--l_norms='Linf L1'" gives all the same.
ALL = schemes("eat eat-uniform eat-mixed sat avg max msd ramp ramp-gp trades L1 ramp5 ramp37 max5 max37-trades")
# Hours of one core, AMD EPYC with AVX-512, reckoned from what docs/schemes.md shows.
DIGITS = Study(  # 4 hours
    train="--dataset=digits --width=8 --attack=apgd --epochs=30 --batch_size=32 --lr-schedule=superconverge --lr-max=0.1",
    evaluation="--n_ex=500 --batch_size_eval=500",
    schemes=ALL,
    seeds=(0, 1, 2, 3, 4),
)
STUDIES = {
    "digits": DIGITS,
    # 1 hour; as many network passes as 30 epochs of eat take
    "digits-equal-cost": replace(
        DIGITS,
        schemes=schemes("eat")
        | {
            name: f"--multinorm={name} --epochs={n}"
            for name, n in {"avg": 10, "max": 11, "msd": 13, "ramp": 15}.items()
        },
        seeds=(0, 1, 2),
    ),
    "digits-optimization": replace(  # 1 hour
        DIGITS,
        schemes=schemes("eat max37-trades label-smoothing adamw awp cosine max37-trades-awp"),
        seeds=(0, 1, 2),
    ),
    "cifar10-narrow": Study(  # 1 hour for the start; 2 for each seed
        start="--dataset=cifar10 --width=16 --attack=apgd --l_norms=Linf --at_iter=5 --epochs=10 "
        "--lr-schedule=superconverge --lr-max=0.1 --amp=bf16",
        train="--dataset=cifar10 --attack=apgd --n_ex_train=10000 --amp=bf16",
        evaluation="--n_ex=1000 --attacks=quick --amp=bf16",
        schemes=schemes("eat eat-uniform max37-trades trades ramp37 max msd"),
        seeds=(0, 1, 2),
    ),
    "cifar10-finetune": Study(  # 3 hours, with --train=--epochs=1 less than 2
        train="--dataset=cifar10 --attack=apgd --finetune_model --model_name=pretr_Linf.pth "
        "--n_ex_train=5000 --amp=bf16",
        evaluation="--n_ex=100 --batch_size_eval=100 --amp=bf16",
        schemes=schemes("eat eat-mixed max ramp"),
    ),
}
# Flags that each job gets from here; --only_clean leaves no union to compare.
TRAIN_OWN, EVAL_OWN = ("seed", "save_dir", "resume", "notes_run"), ("model_name", "save_dir", "resume", "only_clean")


@dataclass(frozen=True)
class Job:
    """A scheme with a seed; flags without those that only say where files are."""

    scheme: str
    seed: int
    train: list[str]
    evaluation: list[str]

    def is_in(self, line: Line) -> bool:
        """Is this line of results.jsonl its result?"""
        key = [self.scheme, self.seed, self.train, self.evaluation]
        return [line.get(name) for name in ("scheme", "seed", "train", "eval")] == key

    def finish(self, folder: Path, where: Sequence[str]) -> Line:
        """Train and evaluate, or go on with both; its line of results.jsonl. Raises SystemExit as the scripts do."""
        flags = [*self.train, f"--seed={self.seed}", f"--notes_run={self.scheme}"]
        run = train.main([*flags, *where, f"--save_dir={folder / 'runs'}", "--resume"])
        digest = sha256(shlex.join(self.evaluation).encode()).hexdigest()[:8]  # another evaluation is not gone on with
        place = [f"--model_name={checkpoint(run)}", f"--save_dir={folder / 'results' / digest}", "--resume"]
        result = eval_script.main([*self.evaluation, *where, *place])
        return self.summary(run, result)

    def summary(self, run: Path, result: Path) -> Line:
        """What its files say, for results.jsonl."""
        config, env, found = (read_json(path) for path in (run / "config.json", run / "env.json", result / "eval.json"))
        records, halves = read_records(run / "metrics.jsonl"), 1 + config["gradient_projection"]
        updates = len(records) * halves * number_of_batches(config["n_ex_train"], config["batch_size"])
        passes = {way: float(np.mean([each["passes"][way] for each in records])) for way in ("forward", "backward")}
        return {
            "scheme": self.scheme,
            "seed": self.seed,
            "norms": config["l_norms"],
            "train": self.train,
            "eval": self.evaluation,
            "accuracy": {name: row["accuracy"] for name, row in found["accuracy"].items()},
            "points": found["accuracy"]["clean"]["points"],
            "outcomes": {name: packed(values) for name, values in found["outcomes"].items()},
            "setting": f"{config['dataset']}: " + ", ".join(f"{n} {a['eps']:.4g}" for n, a in found["norms"].items()),
            "warnings": found["warnings"],
            "epochs": len(records),
            "updates": updates,
            "passes": {way: round(value, 4) for way, value in passes.items()},
            "seconds_per_update": round(sum(each["seconds"] for each in records) / updates, 4),
            "threads": env["threads"],
            "device": env["device"],
            "commit": env["commit"],
            "eval_commit": found["environment"]["commit"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def checkpoint(run: Path) -> Path:
    """Its last one; with --ema the averaged one."""
    config = read_json(run / "config.json")
    return run / f"ep_{config['epochs']}{'_ema' if config.get('ema') else ''}.pth"


def seed_list(text: str) -> tuple[int, ...]:
    """Whole numbers with blanks between, each once."""
    return tuple(dict.fromkeys(between(0, 2**63 - 1, several=True)(text)))


def make_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(prog="benchmarks/compare_schemes.py", description=__doc__)
    parser.add_argument("study", metavar="STUDY", help=f"{', '.join(STUDIES)}, or a name for your own (needed)")
    parser.add_argument("more", metavar="SCHEME", nargs="*", type=scheme, help="more schemes (the study's alone)")
    add_flag(parser, "--only", type=words, help="of all schemes these alone, and the baseline (all)")
    add_flag(parser, "--baseline", help="scheme to which the others are compared (eat, or the first if there is none)")
    add_flag(parser, "--seeds", type=seed_list, help="with blanks between (the study's, else 0)")
    add_flag(parser, "--train", default="", help="flags of train.py for all schemes, behind the study's (none)")
    add_flag(parser, "--eval", default="", help="flags of eval.py, behind the study's (none)")
    add_flag(parser, "--start", default="", help="flags of train.py for the network that all fine-tune, likewise")
    for name in ("data_dir", "model_dir", "device", "threads"):
        add_flag(parser, f"--{name}", help="as for train.py and eval.py (theirs)")
    add_flag(parser, "--save_dir", type=Path, default=Path("results"), help="folder of the study's (./%(default)s)")
    add_flag(parser, "--report_only", action="store_true", help="table and picture of what is finished (off)")
    return parser


def checked(config: type[Config], own: Sequence[str], flags: Sequence[str], what: str) -> None:
    """Raises UsageError if a script would refuse its flags, given by `what`, before anything is done."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            asked = flags_given(make_script_parser(config, None), list(flags))
        if config is TrainConfig:
            resolved(TrainConfig(**asked))
        else:
            checked_eval(EvalConfig(**{"model_name": "start.pth"} | asked))
    except SystemExit as error:
        raise UsageError(what, said.getvalue()) from error
    except UsageError as error:
        raise UsageError(what, error) from error
    if given := [f"--{name}" for name in own if name in asked]:
        raise UsageError(what, f"leave {' '.join(given)} out, each job has its own (seeds: --seeds)")


class Plan:
    """The flags of a study, checked. Usage errors."""

    def __init__(self, args: Namespace, parser: Parser) -> None:
        study = STUDIES.get(args.study, Study())
        if args.study not in STUDIES and not (args.train and args.more):
            names = ", ".join(STUDIES)
            parser.error(f"argument STUDY: {args.study} is none of {names}; for your own give schemes and --train")
        if not re.fullmatch(r"\w[\w.+-]*", args.study, re.ASCII):
            parser.error("argument STUDY: give a name of letters, digits and . _ + -")
        self.name, self.seeds = args.study, args.seeds or study.seeds
        self.train = split("--train", f"{study.train} {args.train}")
        self.evaluation = split("--eval", f"{study.evaluation} {args.eval}")
        self.start = split("--start", f"{study.start} {args.start}")
        everything = study.schemes | dict(args.more)
        self.baseline = args.baseline or ("eat" if "eat" in everything else next(iter(everything)))
        for flag, asked in (("--only", args.only or []), ("--baseline", [self.baseline])):
            if unknown := [name for name in asked if name not in everything]:
                parser.error(f"argument {flag}: {' '.join(unknown)} not among the schemes, {' '.join(everything)}")
        chosen = {*(args.only or everything), self.baseline}
        self.schemes = {name: split(f"SCHEME {name}", text) for name, text in everything.items() if name in chosen}
        checked(EvalConfig, EVAL_OWN, self.evaluation, "--eval")
        if self.start:
            checked(TrainConfig, TRAIN_OWN, self.start, "--start")
        for job in self.jobs(Path("start.pth")):
            checked(TrainConfig, TRAIN_OWN, job.train, f"SCHEME {job.scheme}")

    def jobs(self, start: Path) -> list[Job]:
        """All schemes with the first seed, then with the next; `start`: the network that they fine-tune, if the study has one."""
        tuned = ["--finetune_model", f"--model_name={start}"] if self.start else []
        return [
            Job(name, seed, [*self.train, *tuned, *flags], self.evaluation)
            for seed in self.seeds
            for name, flags in self.schemes.items()
        ]


def split(what: str, text: str) -> list[str]:
    """Words as a shell has them. Raises UsageError."""
    with blame(what):
        return shlex.split(text)


@usage_errors("benchmarks/compare_schemes.py")
def main(argv: Sequence[str] | None = None) -> Path:
    """Do what is not finished yet, write table and picture; the study's folder."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    plan = Plan(args, parser)
    folder = args.save_dir / plan.name
    names = ("data_dir", "model_dir", "device", "threads")
    where = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name)]
    start, results = Path("start.pth"), folder / "results.jsonl"
    if plan.start and args.report_only:
        start = next(map(checkpoint, sorted((folder / "start").glob("*/"))), start)
    elif plan.start:
        start = checkpoint(train.main([*plan.start, *where, f"--save_dir={folder / 'start'}", "--resume"]))
    jobs, lines, failed = plan.jobs(start), [*json_lines(results)] if results.exists() else [], []
    left = [] if args.report_only else [job for job in jobs if not any(job.is_in(line) for line in lines)]
    print(f"{len(left)} of {len(jobs)} jobs to do", flush=True)
    for job in left:
        try:
            line = job.finish(folder, where)
        except SystemExit as end:
            if isinstance(end.code, int) and end.code > 128:  # by a signal
                raise
            failed.append(f"{job.scheme}, seed {job.seed}: {end.code}")
            continue
        append_json_line(results, line)
        lines.append(line)
        print(
            f"{job.scheme}, seed {job.seed}: {', '.join(f'{k} {v:g}' for k, v in line['accuracy'].items())}", flush=True
        )
    found = [(job, next((line for line in lines if job.is_in(line)), None)) for job in jobs]
    done = [Row(name, [line for job, line in found if line and job.scheme == name]) for name in plan.schemes]
    missing = [f"{job.scheme} (seed {job.seed})" for job, line in found if not line]
    if rows := [row for row in done if row.lines]:
        write_report(plan.name, rows, plan.baseline, missing, folder)
    else:
        print(f"nothing is finished in {folder}")
    if failed:
        sys.exit("\n".join(["failed:", *failed]))
    return folder


if __name__ == "__main__":
    main()
