"""`make demo`: a Linf-robust network for digits, then three epochs of E-AT fine-tuning; the union of norms before and after.

Runs the two scripts as a person would, in a folder of its own below ./runs. Exit code 1 if the union gains fewer than 10 points.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from utils.run_folder import new_folder, table

ROOT = Path(__file__).parents[1]
EPOCHS, POINTS = 20, 100


def main() -> None:
    """Train, evaluate, fine-tune, evaluate, compare."""
    start = time.time()
    folder = new_folder(str(ROOT / "runs"), ["demo"])
    digits = ["--dataset=digits", "--device=cpu", f"--save_dir={folder}"]
    sgd = [f"--epochs={EPOCHS}", "--batch_size=64", "--lr-schedule=superconverge", "--lr-max=0.1", "--width=8"]
    script("train.py", *digits, "--attack=apgd", "--l_norms=Linf", *sgd)
    linf = folder / "digits_from-scratch_apgd_Linf_seed0" / f"ep_{EPOCHS}.pth"
    before = evaluate(linf, folder / "before")
    tuning = ["--attack=apgd", "--l_norms=Linf L1", "--batch_size=32", "--finetune_model", f"--model_name={linf}"]
    script("train.py", *digits, *tuning)
    after = evaluate(folder / f"digits_from-ep_{EPOCHS}_apgd_Linf-L1_seed0" / "ep_3.pth", folder / "after")
    gain = after["union"]["accuracy"] - before["union"]["accuracy"]
    print(f"\n{table(before, 'Linf training')}\n{table(after, 'then 3 epochs of E-AT')}")
    print(f"union {gain:+.1f} points; {time.time() - start:.0f} s in all")
    sys.exit(gain < 10)


def evaluate(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The rows of eval.py's table."""
    script("eval.py", f"--model_name={checkpoint}", f"--n_ex={POINTS}", "--device=cpu", f"--save_dir={folder}")
    [result] = folder.glob("*/eval.json")
    rows: dict[str, Any] = json.loads(result.read_text())["accuracy"]
    return rows


def script(name: str, *flags: str) -> None:
    """Run one of the scripts, its command shown."""
    print(f"\n$ python {name} {shlex.join(flags)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / name), *flags], check=True)


if __name__ == "__main__":
    main()
