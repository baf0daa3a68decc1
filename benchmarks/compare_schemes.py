"""Ways to train for several norms side by side: each with the same seeds, evaluated on the same images; a table and a picture.

python benchmarks/compare_schemes.py digits                                             a study: one of STUDIES below
python benchmarks/compare_schemes.py digits mine='--multinorm=ramp --ramp_lambda=1'     a scheme of one's own beside the study's
python benchmarks/compare_schemes.py digits mine='--lr-max=0.2' --only=mine             it and the baseline alone
python benchmarks/compare_schemes.py cifar10-narrow --seeds=0 --train=--n_ex_train=3000 --eval=--n_ex=100 --data_dir=DIR      smaller
python benchmarks/compare_schemes.py my-study eat max --train='--dataset=digits --attack=apgd --epochs=5'     none of STUDIES

A scheme is NAME='flags of train.py', which go behind the study's and --train's; NAME alone is one of SCHEMES below, else --multinorm=NAME.
With --ema the averaged weights are evaluated. For several jobs at once start it several times, with other --seeds or --only. What is
finished is not done again. A job that fails does not end the others; the exit code is 1 then.
In SAVE_DIR/STUDY: runs/, start/ (train.py's folders), results/ (eval.py's), results.jsonl (a line for each scheme and seed), table.md,
compare.png and compare.pdf (of what was asked for).
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
    seeds: tuple[int, ...] = (0, 1, 2)
    start: str = ""  # flags of train.py for a network that is trained first, and that every scheme fine-tunes


SCHEMES = {  # others are --multinorm=NAME
    "trades": "--multinorm=eat --loss=trades",
    "L1": "--l_norms=L1",
    "ramp-gp": "--multinorm=ramp --gradient_projection",  # all of the paper's; an epoch has two halves, of which one is natural
    "ramp5": "--multinorm=ramp --at_iter=5",  # two attacks of half the steps cost little more than one
    "ramp37": "--multinorm=ramp --l_norms='Linf L1' --l_iters='3 7'",  # the same, more steps where they are needed
    "eat26": "--multinorm=eat --l_norms='Linf L1' --l_iters='2 6'",  # half of eat's passes
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


# Hours are of one core with AVX-512. --l_norms is left out: each scheme has those of its paper, L2 among them or not;
# --train="--l_norms='Linf L1'" gives all the same.
DIGITS = Study(  # 4 hours
    train="--dataset=digits --width=8 --attack=apgd --epochs=30 --batch_size=32 --lr-schedule=superconverge --lr-max=0.1",
    evaluation="--n_ex=500 --batch_size_eval=500",
    schemes=schemes("eat eat-uniform eat-mixed sat avg max msd ramp ramp-gp trades L1 ramp5 ramp37 max5 max37-trades"),
    seeds=(0, 1, 2, 3, 4),
)
OPTIMIZATION = schemes("eat max37-trades label-smoothing adamw awp cosine max37-trades-awp")
EPOCHS = {"eat": 30, "avg": 10, "max": 11, "msd": 13, "ramp": 15}  # of about as many passes
EQUAL_COST = {name: f"--multinorm={name}" + f" --epochs={n}" * (n != 30) for name, n in EPOCHS.items()}
STUDIES = {
    "digits": DIGITS,
    "digits-equal-cost": replace(DIGITS, schemes=EQUAL_COST, seeds=(0, 1, 2)),  # 1 hour
    "digits-optimization": replace(DIGITS, schemes=OPTIMIZATION, seeds=(0, 1, 2)),  # 1 hour
    "cifar10-narrow": Study(  # 1 hour for the start; 2 for each seed
        start="--dataset=cifar10 --width=16 --attack=apgd --l_norms=Linf --at_iter=5 --epochs=10 "
        "--lr-schedule=superconverge --lr-max=0.1 --amp=bf16",
        train="--dataset=cifar10 --attack=apgd --n_ex_train=10000 --amp=bf16",
        evaluation="--n_ex=1000 --attacks=quick --amp=bf16",
        schemes=schemes("eat eat-uniform max37-trades trades ramp37 max msd eat26"),
    ),
    "cifar10-finetune": Study(  # 3 hours, with --train=--epochs=1 less than 2
        train="--dataset=cifar10 --attack=apgd --finetune_model --model_name=pretr_Linf.pth --n_ex_train=5000 --amp=bf16",
        evaluation="--n_ex=100 --batch_size_eval=100 --amp=bf16",
        schemes=schemes("eat eat-mixed max ramp"),
        seeds=(0,),
    ),
}
# Flags that each job gets from here; --only_clean leaves no union to compare.
TRAIN_OWN, EVAL_OWN = ("seed", "save_dir", "resume", "notes_run"), ("model_name", "save_dir", "resume", "only_clean")


@dataclass(frozen=True)
class Job:
    """A scheme with a seed; flags without those that only say where files are."""

    scheme: str
    seed: int
    start: list[str]  # of the network that it fine-tunes
    train: list[str]
    eval: list[str]

    def is_in(self, line: Line) -> bool:
        """Is this line of results.jsonl its result?"""
        return {name: line.get(name) for name in vars(self)} == vars(self)

    def finish(self, folder: Path, where: Sequence[str], start: Path | None) -> Line:
        """Train and evaluate, or go on with both; its line of results.jsonl. Raises SystemExit as the scripts do."""
        tuned = ["--finetune_model", f"--model_name={start}"] if start else []
        flags = [*self.train, *tuned, f"--seed={self.seed}", f"--notes_run={self.scheme}"]
        run = train.main([*flags, *where, f"--save_dir={folder / 'runs'}", "--resume"])
        digest = sha256(shlex.join(self.eval).encode()).hexdigest()[:8]  # another evaluation is not gone on with
        place = [f"--model_name={checkpoint(run)}", f"--save_dir={folder / 'results' / digest}", "--resume"]
        result = eval_script.main([*self.eval, *where, *place])
        return self.summary(run, result)

    def summary(self, run: Path, result: Path) -> Line:
        """What its files say, for results.jsonl."""
        config, env, found = (read_json(path) for path in (run / "config.json", run / "env.json", result / "eval.json"))
        records, halves = read_records(run / "metrics.jsonl"), 1 + config["gradient_projection"]
        updates = len(records) * halves * number_of_batches(config["n_ex_train"], config["batch_size"])
        passes = {way: float(np.mean([each["passes"][way] for each in records])) for way in ("forward", "backward")}
        return vars(self) | {
            "norms": config["l_norms"],
            "accuracy": {name: row["accuracy"] for name, row in found["accuracy"].items()},
            "points": found["accuracy"]["clean"]["points"],
            "outcomes": {name: packed(values) for name, values in found["outcomes"].items()},
            "setting": f"{config['dataset']}: " + ", ".join(f"{n} {a['eps']:.4g}" for n, a in found["norms"].items()),
            "warnings": found["warnings"],
            "epochs": len(records),
            "updates": updates,
            "passes": {way: round(value, 4) for way, value in passes.items()},
            "seconds_per_update": round(sum(each["seconds"] for each in records) / updates, 4),
            **{name: env[name] for name in ("threads", "device", "commit")},
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
    except (SystemExit, UsageError) as error:
        raise UsageError(what, said.getvalue() or error) from error
    if given := [f"--{name}" for name in own if name in asked]:
        raise UsageError(what, f"leave {' '.join(given)} out, each job has its own (seeds: --seeds)")


class Plan:
    """The flags of a study, checked. Usage errors."""

    def __init__(self, args: Namespace, parser: Parser) -> None:
        study = STUDIES.get(args.study, Study(seeds=(0,)))
        if args.study not in STUDIES and not (args.train and args.more):
            names = ", ".join(STUDIES)
            parser.error(f"argument STUDY: {args.study} is none of {names}; for your own give schemes and --train")
        if not re.fullmatch(r"\w[\w.+-]*", args.study, re.ASCII):
            parser.error("argument STUDY: give a name of letters, digits and . _ + -")
        train = split("--train", f"{study.train} {args.train}")
        evaluation = split("--eval", f"{study.evaluation} {args.eval}")
        self.name, self.start = args.study, split("--start", f"{study.start} {args.start}")
        everything = study.schemes | dict(args.more)
        self.baseline = args.baseline or ("eat" if "eat" in everything else next(iter(everything)))
        for flag, asked in (("--only", args.only or []), ("--baseline", [self.baseline])):
            if unknown := [name for name in asked if name not in everything]:
                parser.error(f"argument {flag}: {' '.join(unknown)} not among the schemes, {' '.join(everything)}")
        chosen = {*(args.only or everything), self.baseline}
        self.schemes = {name: split(f"SCHEME {name}", text) for name, text in everything.items() if name in chosen}
        checked(EvalConfig, EVAL_OWN, evaluation, "--eval")
        checked(TrainConfig, TRAIN_OWN, self.start, "--start")
        tuned = ["--finetune_model", "--model_name=start.pth"] if self.start else []
        self.jobs = []  # all schemes with the first seed, then with the next
        for seed in args.seeds or study.seeds:
            for name, flags in self.schemes.items():
                checked(TrainConfig, TRAIN_OWN, [*train, *flags, *tuned], f"SCHEME {name}")
                self.jobs.append(Job(name, seed, self.start, [*train, *flags], evaluation))


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
    start, results = None, folder / "results.jsonl"
    jobs, lines, failed = plan.jobs, [*json_lines(results)] if results.exists() else [], []
    left = [] if args.report_only else [job for job in jobs if not any(job.is_in(line) for line in lines)]
    print(f"{len(left)} of {len(jobs)} jobs to do", flush=True)
    if plan.start and left:
        start = checkpoint(train.main([*plan.start, *where, f"--save_dir={folder / 'start'}", "--resume"]))
    for job in left:
        try:
            line = job.finish(folder, where, start)
        except SystemExit as end:
            if isinstance(end.code, int) and end.code > 128:  # by a signal
                raise
            failed.append(f"{job.scheme}, seed {job.seed}: {end.code}")
            continue
        append_json_line(results, line)
        lines.append(line)
        figures = ", ".join(f"{name} {value:g}" for name, value in line["accuracy"].items())
        print(f"{job.scheme}, seed {job.seed}: {figures}", flush=True)
    found = [(job, next((line for line in lines if job.is_in(line)), None)) for job in jobs]
    done = {name: [line for job, line in found if line and job.scheme == name] for name in plan.schemes}
    missing = [f"{job.scheme} (seed {job.seed})" for job, line in found if not line]
    if rows := [Row(*each) for each in done.items() if each[1]]:
        write_report(plan.name, rows, plan.baseline, missing, folder)
    else:
        print(f"nothing is finished in {folder}")
    if failed:
        sys.exit("\n".join(["failed:", *failed]))
    return folder


if __name__ == "__main__":
    main()
