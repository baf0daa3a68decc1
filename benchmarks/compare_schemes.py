"""Ways to train for several norms side by side: each with the same seeds, evaluated on the same points; a table and a picture.

python benchmarks/compare_schemes.py digits                                             a study: one of STUDIES below
python benchmarks/compare_schemes.py digits mine='--multinorm=ramp --ramp_lambda=1'     a scheme of one's own beside the study's
python benchmarks/compare_schemes.py digits mine='--lr-max=0.2' --only=mine             it and the baseline alone
python benchmarks/compare_schemes.py digits --seeds='0 1' --train=--epochs=3 --eval='--n_ex=50 --attacks=fast'      smaller
python benchmarks/compare_schemes.py cifar10-finetune --data_dir=DIR --model_dir=DIR --train=--epochs=1
python benchmarks/compare_schemes.py my-study eat max --train='--dataset=digits --attack=apgd --epochs=5'     none of STUDIES

A scheme is NAME='flags of train.py', which go behind the study's and --train's; NAME alone is one of SCHEMES below, else --multinorm=NAME.
With --ema it is the averaged weights that are evaluated.
What is finished is not done again: after any end, or with more schemes or seeds, the same command goes on. Other flags are other runs.
A job that fails does not end the others; it is told at the end, and the exit code is 1.

In SAVE_DIR/STUDY: runs/ (train.py's folders, with eval.py's in them), logs/, results.jsonl (a line for each scheme and seed that is
finished), table.md, compare.png and compare.pdf (with --equal_cost: table-equal_cost.md, ...): of what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from benchmarks.scheme_report import Line, Row, write_report
from config import Config, EvalConfig, TrainConfig, checked_eval, flags_given, resolved, same_command
from config import make_parser as make_script_parser
from data import number_of_batches
from plot import read_records
from utils.checkpoint import state_files
from utils.cli import Parser, UsageError, add_flag, between, blame, usage_errors, words
from utils.resume import lock_run, newest_run
from utils.run_folder import append_json_line, read_json
from utils.signals import Interrupted, Signals

ROOT = Path(__file__).parents[1]
Result = TypeVar("Result")
Failures = dict[str, Exception]  # by what failed


@dataclass(frozen=True)
class Study:
    """What its schemes share. Flags are written as in a shell, lists with blanks."""

    train: str = ""  # flags of train.py
    evaluation: str = ""  # flags of eval.py
    schemes: str = ""
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
}
# --l_norms is left out: each has those of its paper, L2 among them or not. --train="--l_norms='Linf L1'" gives all the same.
ALL = "eat eat-uniform eat-mixed sat avg max msd ramp ramp-gp trades L1 ramp5 ramp37 max5 max37-trades"
# Hours of one core, AMD EPYC with AVX-512, reckoned from what docs/schemes.md shows.
STUDIES = {
    "digits": Study(  # 4 hours; --equal_cost 1 more
        train="--dataset=digits --width=8 --attack=apgd --epochs=30 --batch_size=32 "
        "--lr-schedule=superconverge --lr-max=0.1",
        evaluation="--n_ex=500 --batch_size_eval=500",
        schemes=ALL,
        seeds=(0, 1, 2, 3, 4),
    ),
    "cifar10-narrow": Study(  # 1 hour for the start; 2 for each seed
        start="--dataset=cifar10 --width=16 --attack=apgd --l_norms=Linf --at_iter=5 --epochs=10 "
        "--lr-schedule=superconverge --lr-max=0.1 --amp=bf16",
        train="--dataset=cifar10 --attack=apgd --n_ex_train=10000 --amp=bf16",
        evaluation="--n_ex=1000 --attacks=quick --amp=bf16",
        schemes="eat eat-uniform max37-trades trades ramp37 max msd",
        seeds=(0, 1, 2),
    ),
    "cifar10-finetune": Study(  # 3 hours, with --train=--epochs=1 less than 2
        train="--dataset=cifar10 --attack=apgd --finetune_model --model_name=pretr_Linf.pth "
        "--n_ex_train=5000 --amp=bf16",
        evaluation="--n_ex=100 --batch_size_eval=100 --amp=bf16",
        schemes="eat eat-mixed max ramp",
    ),
}
# Flags that each job gets from here; --only_clean leaves no union to compare.
TRAIN_OWN, EVAL_OWN = ("seed", "save_dir", "resume", "notes_run"), ("model_name", "save_dir", "resume", "only_clean")
TAIL = 12  # lines of the log of a job that failed


@dataclass(frozen=True)
class Job:
    """A scheme with a seed; flags without those that only say where files are."""

    scheme: str
    seed: int
    train: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people and for its log."""
        return f"{self.scheme}_seed{self.seed}"

    def is_in(self, line: Line) -> bool:
        """Is this line of results.jsonl its result?"""
        key = [self.scheme, self.seed, list(self.train), list(self.evaluation)]
        return [line.get(name) for name in ("scheme", "seed", "train", "eval")] == key


class Failed(Exception):
    """A script did not end well; the message has the end of its log."""


class Scripts:
    """Runs train.py and eval.py in processes of their own, so many jobs at once, and keeps what they leave in `folder`."""

    def __init__(self, folder: Path, where: Sequence[str], jobs: int, report_only: bool = False) -> None:
        self.folder, self.where, self.jobs, self.report_only = folder, list(where), jobs, report_only
        self.threads = max(1, torch.get_num_threads() // jobs)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.lock = Lock()  # of the two above

    def run(self, script: str, flags: Sequence[str], name: str) -> None:
        """Run it to its end; what it says goes to logs/NAME.log. Raises Failed."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(self.threads), "TQDM_MININTERVAL": "60"}
        with log.open("a", errors="backslashreplace") as file:
            file.write(f"$ python {script} {shlex.join(flags)}\n")
            file.flush()
            with self.lock:
                if self.stopped:
                    raise Failed("not begun")
                command = [sys.executable, str(ROOT / script), *flags]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | threads)
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if code:
            said = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
            raise Failed("\n".join([f"{script} ended with {code}, the end of {log}:", *said[-TAIL:]]))

    def newest(self, flags: Sequence[str], place: str) -> Path | None:
        """The run with these flags in folder/PLACE that is complete, if there is one."""
        asked = flags_given(make_script_parser(TrainConfig, None), flags)
        run = newest_run(str(self.folder / place), lambda config: same_command(asked, config["asked"]))
        return run if run and not state_files(run) and checkpoint(run).exists() else None

    def trained(self, flags: Sequence[str], place: str, name: str) -> Path:
        """The same, trained now or gone on with if there is none. Raises Failed."""
        if run := self.newest(flags, place):
            return run
        if self.report_only:
            raise Failed("not trained yet")
        self.run("train.py", [*flags, *self.where, f"--save_dir={self.folder / place}", "--resume"], name)
        if run := self.newest(flags, place):
            return run
        raise Failed(f"train.py left no complete run in {self.folder / place}")

    def evaluated(self, run: Path, flags: Sequence[str], name: str) -> Path:
        """The eval.json of a complete run, which lies in its folder. Raises Failed."""
        folder = run / f"eval-{hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]}"
        place = [f"--model_name={checkpoint(run)}", f"--save_dir={folder}", "--resume"]
        self.run("eval.py", [*flags, *self.where, *place], name)
        if results := sorted(folder.glob("*/eval.json"), key=lambda path: path.stat().st_mtime_ns):
            return results[-1]
        raise Failed(f"eval.py left no eval.json in {folder}")

    def finish(self, job: Job) -> Line:
        """Train, evaluate; the job's line of results.jsonl. Raises Failed."""
        run = self.trained([*job.train, f"--seed={job.seed}", f"--notes_run={job.scheme}"], "runs", job.name)
        result = self.evaluated(run, job.evaluation, job.name)
        places = {"run": str(run.relative_to(self.folder)), "result": str(result.parent.relative_to(self.folder))}
        return summary(job, run, result) | {"jobs": self.jobs} | places

    def all_of(self, works: Mapping[str, Callable[[], Result]], keep: Callable[[str, Result], None]) -> Failures:
        """Do them all, `keep` each result as it comes; what failed and why. Raises Interrupted when its processes have saved and ended."""
        failures: Failures = {}
        with Signals() as signals, ThreadPoolExecutor(self.jobs) as pool:
            names = {pool.submit(work): name for name, work in works.items()}
            try:
                with signals.at_once():
                    for future in as_completed(names):
                        try:
                            keep(names[future], future.result())
                        except Interrupted:
                            raise
                        except Exception as error:
                            failures[names[future]] = error
                            print(f"{names[future]} FAILED", flush=True)
            except BaseException:
                with self.lock:
                    self.stopped = True
                    for process in self.running:
                        process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failures


def checkpoint(run: Path) -> Path:
    """Its last one, when it is complete; with --ema the averaged one."""
    config = read_json(run / "config.json")
    return run / f"ep_{config['epochs']}{'_ema' if config.get('ema') else ''}.pth"


def summary(job: Job, run: Path, result: Path) -> Line:
    """What a finished job's files say, for results.jsonl."""
    config, env, evaluation = (read_json(path) for path in (run / "config.json", run / "env.json", result))
    records = read_records(run / "metrics.jsonl")
    updates = len(records) * halves(config) * number_of_batches(config["n_ex_train"], config["batch_size"])
    return {
        "scheme": job.scheme,
        "seed": job.seed,
        "norms": config["l_norms"],
        "train": list(job.train),
        "eval": list(job.evaluation),
        "accuracy": {name: row["accuracy"] for name, row in evaluation["accuracy"].items()},
        "points": evaluation["accuracy"]["clean"]["points"],
        "setting": f"{config['dataset']}: " + ", ".join(f"{n} {a['eps']:.4g}" for n, a in evaluation["norms"].items()),
        "warnings": evaluation["warnings"],
        "epochs": len(records),
        "updates": updates,
        "passes": passes(records),
        "seconds_per_update": round(sum(record["seconds"] for record in records) / updates, 4),
        "threads": env["threads"],
        "device": env["device"],
        "commit": env["commit"],
        "eval_commit": evaluation["environment"]["commit"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def halves(config: Line) -> int:
    """How often an epoch of the run with this config.json passes over the training points."""
    return 2 if config.get("gradient_projection") else 1


def passes(records: Sequence[Line]) -> dict[str, float] | None:
    """Network passes per image of an update, forward and backward, mean over the epochs; None if train.py did not count them."""
    if not records or not all("passes" in record for record in records):
        return None
    return {way: round(float(np.mean([r["passes"][way] for r in records])), 4) for way in ("forward", "backward")}


def read_results(path: Path) -> list[Line]:
    """The lines, but for those that were cut off."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}: a line is no JSON, it is not used")
    return lines


def add_result(path: Path, line: Line) -> None:
    """One more line, on a line of its own even if the last was cut off."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
    append_json_line(path, line)


def seed_list(text: str) -> tuple[int, ...]:
    """Whole numbers with blanks between, each once."""
    return tuple(dict.fromkeys(between(0, 2**63 - 1, several=True)(text)))


def scheme(text: str) -> tuple[str, str]:
    """NAME and its flags, of NAME='flags' or of NAME alone."""
    name, given, flags = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise ArgumentTypeError(f"give NAME or NAME='flags', NAME of letters, digits and . _ + -, not {text!r}")
    return name, flags if given else SCHEMES.get(name, f"--multinorm={name}")


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
    add_flag(
        parser, "--start", default="", help="flags of train.py for the network that all fine-tune, behind the study's"
    )
    add_flag(
        parser,
        "--equal_cost",
        action="store_true",
        help="as many network passes as the baseline's epochs take, by an epoch of each that is measured first; "
        "a scheme that gives --epochs keeps them. Runs that cost the same anyway are shared with the same study without it "
        "(off: as many epochs)",
    )
    add_flag(
        parser, "--jobs", type=between(1, 256), default=1, help="jobs at once, which share the cores (%(default)s)"
    )
    add_flag(parser, "--data_dir", help="as for train.py and eval.py (theirs)")
    add_flag(parser, "--model_dir", help="as for train.py and eval.py (theirs)")
    add_flag(parser, "--device", help="as for train.py and eval.py (theirs)")
    add_flag(parser, "--save_dir", type=Path, default=Path("results"), help="folder of the study's (./%(default)s)")
    add_flag(parser, "--report_only", action="store_true", help="table and picture of what is finished (off)")
    return parser


def study_of(args: Namespace, parser: Parser) -> Study:
    """The study that was asked for, with the flags given."""
    if args.study not in STUDIES and not (args.train and args.more):
        parser.error(
            f"argument STUDY: {args.study} is none of {', '.join(STUDIES)}; for your own give schemes and --train"
        )
    if not re.fullmatch(r"\w[\w.+-]*", args.study, re.ASCII):
        parser.error("argument STUDY: give a name of letters, digits and . _ + -")
    study = STUDIES.get(args.study, Study())
    return replace(
        study,
        train=f"{study.train} {args.train}",
        evaluation=f"{study.evaluation} {args.eval}",
        seeds=args.seeds or study.seeds,
        start=f"{study.start} {args.start}".strip(),
    )


def checked(config: type[Config], own: Sequence[str], flags: Sequence[str], what: str) -> Any:
    """The configuration of a script's flags, given by `what`. Raises UsageError if it would refuse them, before anything is done."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            asked = flags_given(make_script_parser(config, None), list(flags))
        if config is TrainConfig:
            found: Any = resolved(TrainConfig(**asked))
        else:
            found = checked_eval(EvalConfig(**{"model_name": "start.pth"} | asked))
    except SystemExit as error:
        raise UsageError(what, said.getvalue()) from error
    except UsageError as error:
        raise UsageError(what, error) from error
    if given := [f"--{name}" for name in own if name in asked]:
        raise UsageError(what, f"leave {' '.join(given)} out, each job has its own (seeds: --seeds)")
    return found


class Plan:
    """The flags of a study, checked. Usage errors."""

    def __init__(self, args: Namespace, parser: Parser) -> None:
        study = study_of(args, parser)
        self.name, self.seeds, self.equal_cost = args.study, study.seeds, args.equal_cost
        with blame("--train"):
            self.train = shlex.split(study.train)
        with blame("--eval"):
            self.evaluation = shlex.split(study.evaluation)
        with blame("--start"):
            self.start = shlex.split(study.start)
        schemes = {}
        for name, flags in [*map(scheme, study.schemes.split()), *args.more]:
            with blame(f"SCHEME {name}"):
                schemes[name] = shlex.split(flags)
        self.baseline = args.baseline or ("eat" if "eat" in schemes else next(iter(schemes)))
        for flag, names in (("--only", args.only or []), ("--baseline", [self.baseline])):
            if unknown := [name for name in names if name not in schemes]:
                parser.error(f"argument {flag}: {' '.join(unknown)} not among the schemes, {' '.join(schemes)}")
        chosen = {*(args.only or schemes), self.baseline}
        self.schemes = {name: flags for name, flags in schemes.items() if name in chosen}
        checked(EvalConfig, EVAL_OWN, self.evaluation, "--eval")
        if self.start:
            checked(TrainConfig, TRAIN_OWN, self.start, "--start")
        self.epochs: dict[str, int] = {}
        self.init_epochs: dict[str, int] = {}
        for name in self.schemes:
            flags = self.flags(name, Path("start.pth"))
            config = checked(TrainConfig, TRAIN_OWN, flags, f"SCHEME {name}")
            self.epochs[name], self.init_epochs[name] = config.epochs, config.init_epochs

    def flags(self, name: str, start: Path | None) -> list[str]:
        """Of train.py, for a scheme; `start`: the network that was trained for it, if one was."""
        tuned = ["--finetune_model", f"--model_name={start}"] if self.start else []
        return [*self.train, *tuned, *self.schemes[name]]

    def has_own_epochs(self, name: str) -> bool:
        """Does the scheme itself say how many?"""
        return any(flag.partition("=")[0] == "--epochs" for flag in self.schemes[name])


def equal_epochs(scripts: Scripts, plan: Plan, flags: dict[str, list[str]]) -> tuple[dict[str, int], Failures]:
    """Epochs of each scheme that has none of its own, so that all cost as many passes as the baseline; what failed.

    One epoch of each is measured. Those of --init_epochs, which are not measured, have a pass forward and one backward.
    Raises Failed if the baseline's cost is not known.
    """
    probed = [name for name in flags if name == plan.baseline or not plan.has_own_epochs(name)]
    spent: dict[str, float] = {}

    def probe(name: str) -> Path:
        wanted = [*flags[name], "--epochs=1", "--init_epochs=0", f"--seed={plan.seeds[0]}", f"--notes_run={name}"]
        return scripts.trained(wanted, "probes", f"{name}_probe")

    def keep(name: str, run: Path) -> None:
        counted = passes(read_records(run / "metrics.jsonl"))
        if not counted:
            raise Failed(f"{run} does not tell its passes")
        spent[name] = halves(read_json(run / "config.json")) * (counted["forward"] + counted["backward"])

    failures = scripts.all_of({name: partial(probe, name) for name in probed}, keep)
    if plan.baseline not in spent:
        raise Failed(f"the cost of {plan.baseline} is not known: {failures[plan.baseline]}")
    first = {name: 2 * plan.init_epochs[name] for name in spent}  # passes of the first epochs
    later = plan.epochs[plan.baseline] - plan.init_epochs[plan.baseline]
    whole = first[plan.baseline] + later * spent[plan.baseline]
    epochs = {}
    for name in spent:
        if not plan.has_own_epochs(name):
            epochs[name] = plan.init_epochs[name] + max(1, round((whole - first[name]) / spent[name]))
    return epochs, failures


def all_jobs(scripts: Scripts, plan: Plan) -> tuple[list[Job], Failures]:
    """What is to be done, once start and costs are known, and schemes whose cost is not. Raises Failed."""
    start: dict[str, Path] = {}
    if plan.start:
        train_it = partial(scripts.trained, plan.start, "start", "start")
        if failures := scripts.all_of({"start": train_it}, start.__setitem__):
            raise Failed(f"the network to fine-tune: {failures['start']}")
    network = checkpoint(start["start"]) if plan.start else None
    flags = {name: plan.flags(name, network) for name in plan.schemes}
    failures = {}
    if plan.equal_cost:
        epochs, failures = equal_epochs(scripts, plan, flags)
        flags |= {
            name: [*flags[name], f"--epochs={number}"] for name, number in epochs.items() if number != plan.epochs[name]
        }
    jobs = [
        Job(name, seed, tuple(flags[name]), tuple(plan.evaluation))
        for seed in plan.seeds  # all schemes with the first seed, then with the next: they compare from then on
        for name in flags
        if name not in failures
    ]
    return jobs, failures


def do(scripts: Scripts, jobs: Sequence[Job]) -> Failures:
    """All that are not finished yet; what failed."""
    results = scripts.folder / "results.jsonl"
    before = read_results(results)
    works = {job.name: partial(scripts.finish, job) for job in jobs if not any(job.is_in(line) for line in before)}
    print(f"{len(works)} of {len(jobs)} jobs to do, {scripts.jobs} at once, {scripts.threads} threads each", flush=True)

    def keep(name: str, line: Line) -> None:
        add_result(results, line)
        told = ", ".join(f"{row} {value:g}" for row, value in line["accuracy"].items())
        print(f"{name}: {told}", flush=True)

    return scripts.all_of(works, keep)


def report(plan: Plan, jobs: Sequence[Job], folder: Path) -> None:
    """Table and picture of the jobs that are finished."""
    lines = read_results(folder / "results.jsonl")
    found = {job: line for line in lines for job in jobs if job.is_in(line)}
    finished = {name: [found[job] for job in jobs if job.scheme == name and job in found] for name in plan.schemes}
    rows = [Row(name, lines) for name, lines in finished.items() if lines]
    if rows:
        title = plan.name + (
            f", each at the cost of {plan.epochs[plan.baseline]} epochs of {plan.baseline}" if plan.equal_cost else ""
        )
        missing = [name for name in plan.schemes if not any(job.scheme == name for job in jobs)]
        missing += [job.name for job in jobs if job not in found]
        write_report(title, rows, plan.baseline, missing, folder, "-equal_cost" if plan.equal_cost else "")
    else:
        print(f"nothing is finished in {folder}")


@usage_errors("benchmarks/compare_schemes.py")
def main(argv: Sequence[str] | None = None) -> Path:
    """Do what is not finished yet, write table and picture; the study's folder."""
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    plan = Plan(args, parser)
    folder = args.save_dir / plan.name
    where = [f"--{name}={getattr(args, name)}" for name in ("data_dir", "model_dir", "device") if getattr(args, name)]
    scripts = Scripts(folder, where, args.jobs, args.report_only)
    with ExitStack() as held:
        if not args.report_only:
            with blame("--save_dir"):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_run(folder, seconds=0))
        try:
            jobs, failures = all_jobs(scripts, plan)
            if not args.report_only:
                failures |= do(scripts, jobs)
        except Interrupted as end:
            print(f"{end}: the same command goes on", flush=True)
            sys.exit(end.code)
        except Failed as error:
            sys.exit(f"{parser.prog}: {error}")
        report(plan, jobs, folder)
    for name, why in failures.items():
        print(f"\n{name} failed: {why if isinstance(why, Failed) else repr(why)}", file=sys.stderr)
    if failures:
        sys.exit(1)
    return folder


if __name__ == "__main__":
    main()
