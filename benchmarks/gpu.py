"""What a machine with an NVIDIA card shows: tests, speed, and the paper's experiment at full size. Writes docs/gpu/DEVICE.json and .md.

make gpu [PART=N] [DATA_DIR=DIR]                all parts, or part N
python benchmarks/gpu.py --part=3               the same with this Python, where torch is installed already
python benchmarks/gpu.py --dry_run              everything in small on the digits, in minutes on a CPU; its figures mean nothing

1 tests: those marked gpu; training and evaluation with NCCL, a process on each GPU
2 speed: benchmarks/gpu_speed.py
3 pretrain: a Linf-robust PreAct ResNet-18 on all of CIFAR-10, 30 epochs
4 finetune: three epochs of E-AT on it
5 evaluate: 1,000 points before and after

With --part it ends within --minutes, and goes on when the same part is asked for again. What is done is not done again: to measure
anew, delete --work. Nothing is downloaded if --data_dir has CIFAR-10.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from utils.cli import Parser, add_flag, between, inside
from utils.distributed import choose_device
from utils.run_folder import environment, read_json, write_json

ROOT = Path(__file__).parents[1]


class NotFinished(Exception):
    """A part reached its limit; what it did is kept."""


@dataclass(frozen=True)
class Size:
    """Of the experiment."""

    data: tuple[str, ...]
    network: tuple[str, ...]
    epochs: int
    points: int
    speed: tuple[str, ...]
    format: str = "bf16"


FULL = Size(("--dataset=cifar10",), (), 30, 1000, ("--compile",))
SMALL = Size(
    ("--dataset=digits", "--n_ex_train=256"), ("--width=4", "--batch_size=64"), 2, 8, ("--updates=2", "--batch_size=4", "--width=4"), "off"
)  # fmt: skip


class Experiment:
    """The parts, each of which returns its result. `deadline`: of one part, on the clock of time.monotonic."""

    def __init__(self, args: Any, deadline: float | None) -> None:
        self.work, self.deadline = args.work, deadline
        self.size = SMALL if args.dry_run else FULL
        self.device = choose_device(args.device)
        self.place = [f"--data_dir={args.data_dir}", f"--device={self.device}"]

    def tests(self) -> dict[str, Any]:
        """Tests marked gpu; one epoch and an evaluation with torchrun, on each GPU a process."""
        file = self.work / "pytest.xml"
        self.run("-m", "pytest", "-m", "gpu", "-q", f"--junitxml={file.absolute()}")
        [suite] = ElementTree.parse(file).getroot()
        found: dict[str, Any] = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
        processes = max(torch.cuda.device_count(), 1)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        digits = ["--dataset=digits", "--device=auto" if torch.cuda.is_available() else "--device=cpu"]
        folder, start = self.work / "torchrun", time.monotonic()
        flags = ["--attack=apgd", "--epochs=1", "--width=8", "--sync_bn", "--n_ex_train=512", f"--save_dir={folder}"]
        self.run(*torchrun, "train.py", *digits, *flags)
        network = newest(folder, "*/ep_1.pth")
        flags = ["--attacks=fast", "--n_iter=10", "--n_ex=64", f"--save_dir={folder}"]
        self.run(*torchrun, "eval.py", digits[1], f"--model_name={network}", *flags)
        rows = read_json(newest(folder, "*/eval.json"))["accuracy"]
        return found | {"processes": processes, "union_on_digits": rows["union"]["accuracy"], "seconds": since(start)}

    def speed(self) -> dict[str, Any]:
        """The table of benchmarks/gpu_speed.py."""
        out = self.work / "speed.json"
        self.run("benchmarks/gpu_speed.py", f"--device={self.device}", *self.size.speed, f"--out={out}")
        return read_json(out)

    def pretrain(self) -> dict[str, Any]:
        """A Linf-robust network from scratch."""
        schedule = [f"--epochs={self.size.epochs}", "--lr-schedule=superconverge", "--lr-max=0.2"]
        return self.train("pretrain", "--l_norms=Linf", *schedule, *self.size.network)

    def finetune(self) -> dict[str, Any]:
        """Three epochs of E-AT on it."""
        network = newest(self.work, f"pretrain/*/ep_{self.size.epochs}.pth")
        return self.train("finetune", "--l_norms=Linf L1", "--finetune_model", f"--model_name={network}")

    def evaluate(self) -> dict[str, Any]:
        """The standard evaluation before and after, in float32."""
        networks = {"before": f"pretrain/*/ep_{self.size.epochs}.pth", "after": "finetune/*/ep_3.pth"}
        found = {}
        for when, pattern in networks.items():
            flags = [
                f"--model_name={newest(self.work, pattern)}",
                f"--n_ex={self.size.points}",
                "--batch_size_eval=500",
            ]
            self.run("eval.py", *self.place, *flags, f"--save_dir={self.work / when}", "--resume")
            content = read_json(newest(self.work / when, "*/eval.json"))
            found[when] = {name: content[name] for name in ("accuracy", "seconds", "warnings")}
        return found

    def train(self, name: str, *flags: str) -> dict[str, Any]:
        """A training in the part's format; its figures from metrics.jsonl."""
        more = [f"--amp={self.size.format}", f"--save_dir={self.work / name}", "--save_every=1", "--resume"]
        self.run("train.py", *self.size.data, *self.place, "--attack=apgd", *flags, *more)
        folder = newest(self.work / name, "*/metrics.jsonl").parent
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {"command": read_json(folder / "env.json")["command"], "epochs": epochs}

    def run(self, *command: str) -> None:
        """Run Python so. Raises NotFinished at the deadline, CalledProcessError."""
        print(f"\npython {' '.join(command)}", flush=True)
        with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
            try:
                process.wait(None if self.deadline is None else max(self.deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # train.py saves its state, eval.py has kept its own
                raise NotFinished from None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


PARTS: dict[str, Callable[[Experiment], dict[str, Any]]] = {
    "tests": Experiment.tests,
    "speed": Experiment.speed,
    "pretrain": Experiment.pretrain,
    "finetune": Experiment.finetune,
    "evaluate": Experiment.evaluate,
}


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last. Raises FileNotFoundError."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {folder / pattern}: run the parts in their order, {', '.join(PARTS)}")
    return found[-1]


def since(start: float) -> float:
    """Seconds."""
    return round(time.monotonic() - start, 1)


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table of rows, whose keys are the columns; a key that a row lacks is an empty cell."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(heads)} |".replace("_", " "), "|---" * len(heads) + "|"]
    return [*lines, *(f"| {' | '.join(str(row.get(key, '')) for key in heads)} |" for row in rows)]


def page(content: dict[str, Any]) -> str:
    """DEVICE.md, from what is in DEVICE.json."""
    parts = content["parts"]
    results = {name: part["result"] for name, part in parts.items()}
    packages = ", ".join(f"{name} {content['environment']['packages'][name]}" for name in ("torch", "torchvision"))
    text = [f"# {content['environment']['device']}", "", f"`make gpu`, {packages}.", ""]
    text += [
        *markdown([{"part": name, "date": part["date"], "commit": part["commit"]} for name, part in parts.items()]),
        "",
    ]
    if "tests" in results:
        text += ["## Tests", "", *markdown([results["tests"]]), ""]
    for name, rows in results.get("speed", {}).items():
        text += [f"## Speed: {name}", "", *markdown(rows), ""]
    for name in ("pretrain", "finetune"):
        if name in results:
            rows = [{key: epoch[key] for key in ("epoch", "loss", "seconds")} for epoch in results[name]["epochs"]]
            text += [
                f"## {name.capitalize()}",
                "",
                f"`{shlex.join(results[name]['command'])}`",
                "",
                *markdown(rows),
                "",
            ]
    if "evaluate" in results:
        rows = [
            {"network": when} | {norm: row["accuracy"] for norm, row in found["accuracy"].items()} | {"seconds": found["seconds"]}
            for when, found in results["evaluate"].items()
        ]  # fmt: skip
        text += ["## Accuracy in %, before and after fine-tuning", "", *markdown(rows), ""]
    missing = [name for name in PARTS if name not in parts]
    return "\n".join([*text, *([f"Not run: {', '.join(missing)}."] if missing else [])]).rstrip() + "\n"


def report(parts: dict[str, Any], env: dict[str, Any], folder: Path) -> Path:
    """Write DEVICE.json and DEVICE.md; the page's path."""
    content = {
        "environment": {name: env[name] for name in ("device", "platform", "python", "packages")},
        "parts": parts,
    }
    path = folder / (re.sub(r"\W+", "-", env["device"]).strip("-") + ".md")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), content)
    path.write_text(page(content), encoding="utf-8")
    return path


def main() -> None:
    """Run the parts that are not done; exit code 75 if a part is to be asked for again, 1 if one failed."""
    parser = Parser(prog="benchmarks/gpu.py", description=__doc__)
    add_flag(parser, "--part", type=between(1, len(PARTS)), help="number of one part (all)")
    add_flag(parser, "--minutes", type=inside(0.0, 1e6), default=8.5, help="limit of one --part (%(default)s)")
    add_flag(
        parser, "--data_dir", default="./datasets", help="folder with, or for the download of, CIFAR-10 (%(default)s)"
    )
    add_flag(parser, "--device", default="auto", help="device (%(default)s)")
    add_flag(
        parser, "--work", type=Path, help="folder for networks and what is done (runs/gpu; dry run: runs/gpu_dry_run)"
    )
    add_flag(
        parser, "--out", type=Path, help="folder for DEVICE.json and DEVICE.md (docs/gpu; dry run: that of --work)"
    )
    add_flag(parser, "--dry_run", action="store_true", help="everything in small on the digits (off)")
    args = parser.parse_args()
    args.work = (args.work or Path("runs/gpu_dry_run" if args.dry_run else "runs/gpu")).absolute()
    out = (args.out or (args.work if args.dry_run else ROOT / "docs/gpu")).absolute()
    experiment = Experiment(args, time.monotonic() + 60 * args.minutes if args.part else None)
    done = args.work / "results.json"
    args.work.mkdir(parents=True, exist_ok=True)
    parts = read_json(done) if done.exists() else {}
    for name in [list(PARTS)[args.part - 1]] if args.part else PARTS:
        if name in parts:
            print(f"{name} is done: {done}")
            continue
        env = environment(experiment.device)
        try:
            result = PARTS[name](experiment)
        except NotFinished:
            print(f"{name} is not finished: ask for it again, and it goes on", file=sys.stderr)
            sys.exit(os.EX_TEMPFAIL)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            sys.exit(f"benchmarks/gpu.py: {name}: {error}")
        parts[name] = {"date": env["started"][:10], "commit": env["commit"], "result": result}
        write_json(done, parts)
    print(f"wrote {report(parts, environment(experiment.device), out)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nbenchmarks/gpu.py: interrupted; what is done is kept", file=sys.stderr)
        sys.exit(130)
