"""`make gpu`, in small and without a GPU: it runs what it says, goes on where it was cut off, and writes its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def dry_run(work: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--dry_run", "--device=cpu", f"--work={work}", *flags]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_all_parts(tmp_path: Path) -> None:
    told = dry_run(tmp_path)
    assert told.returncode == 0, told.stderr
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert list(content["parts"]) == list(PARTS)
    results = {name: part["result"] for name, part in content["parts"].items()}
    assert (results["tests"]["failures"], results["tests"]["errors"]) == (0, 0)
    assert {row["norm"] for row in results["speed"]["attacks"]} == {"Linf", "L2", "L1"}
    assert all(row["ms"] > 0 for row in results["speed"]["training"])
    assert results["speed"]["projection"][0]["error"] < 1e-6
    assert len(results["pretrain"]["epochs"]) == 2
    assert len(results["finetune"]["epochs"]) == 3
    page = (tmp_path / "cpu.md").read_text()
    for when in ("before", "after"):
        assert f"| {when} | {results['evaluate'][when]['accuracy']['clean']['accuracy']} |" in page
    assert "Not run" not in page
    again = dry_run(tmp_path)
    assert again.returncode == 0
    assert "train.py" not in again.stdout  # what is done is not done again


def test_a_part_goes_on_where_its_limit_stopped_it(tmp_path: Path) -> None:
    stopped = dry_run(tmp_path, "--part=3", "--minutes=0.01")
    assert stopped.returncode == os.EX_TEMPFAIL, stopped.stderr
    assert "ask for it again" in stopped.stderr
    assert not (tmp_path / "results.json").exists()
    assert dry_run(tmp_path, "--part=3").returncode == 0
    assert "Not run: tests, speed, finetune, evaluate." in (tmp_path / "cpu.md").read_text()


def test_a_part_names_the_one_that_it_needs(tmp_path: Path) -> None:
    told = dry_run(tmp_path, "--part=4")
    assert (told.returncode, told.stderr.count("\n")) == (1, 1)
    assert "run the parts in their order" in told.stderr
