"""`make demo`: a Linf-robust network for digits, then three epochs of E-AT fine-tuning; the union of norms before and after.

Runs the two scripts as a person would, on one CPU thread, in a folder of its own below ./runs. Exit code 1 if the union gains fewer
than 10 points.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from attacks.results import table
from utils.run_folder import new_folder

ROOT = Path(__file__).parents[1]
EPOCHS, EXAMPLES = 20, 100
# More threads wait for each other on a busy machine, and gain little on digits.
ONE_THREAD = ["--device=cpu", "--threads=1"]


def main() -> None:
    """Train, evaluate, fine-tune, evaluate, compare."""
    os.chdir(ROOT)
    start = time.time()
    folder = new_folder("runs", ["demo"])
    digits = ["--dataset=digits", *ONE_THREAD, f"--save_dir={folder}"]
    sgd = [f"--epochs={EPOCHS}", "--batch_size=64", "--lr-schedule=superconverge", "--lr-max=0.1", "--width=8"]
    script("train.py", *digits, "--attack=apgd", "--l_norms=Linf", *sgd)
    linf = checkpoint(folder, EPOCHS)
    before = evaluate(linf, folder / "before")
    tuning = ["--attack=apgd", "--l_norms=Linf L1", "--batch_size=32", "--finetune_model", f"--model_name={linf}"]
    script("train.py", *digits, *tuning)
    after = evaluate(checkpoint(folder, 3), folder / "after")
    gain = after["union"]["accuracy"] - before["union"]["accuracy"]
    print(f"\n{table(before, 'Linf training')}\n{table(after, 'then 3 epochs of E-AT')}")
    print(f"union {gain:+.1f} points; {time.time() - start:.0f} s in all")
    print("Another processor rounds differently: there a figure may differ by some points (README).")
    sys.exit(gain < 10)


def checkpoint(folder: Path, epoch: int) -> Path:
    """Of the run in `folder` that ended with this epoch."""
    [path] = folder.glob(f"*/ep_{epoch}.pth")
    return path


def evaluate(network: Path, folder: Path) -> dict[str, Any]:
    """The rows of eval.py's table."""
    script("eval.py", f"--model_name={network}", f"--n_ex={EXAMPLES}", *ONE_THREAD, f"--save_dir={folder}")
    [result] = folder.glob("*/eval.json")
    rows: dict[str, Any] = json.loads(result.read_text())["accuracy"]
    return rows


def script(name: str, *flags: str) -> None:
    """Run one of the scripts; the line that it prints first can be pasted into a shell in this folder."""
    python = os.path.relpath(sys.executable)
    print(f"\n{python} {name} {shlex.join(flags)}", flush=True)
    # In a session of its own it does not see Ctrl-C, which then ends everything with one line.
    subprocess.run([sys.executable, name, *flags], check=True, start_new_session=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nmake demo: interrupted", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"make demo: {error.cmd[1]} ended with exit code {error.returncode}")
