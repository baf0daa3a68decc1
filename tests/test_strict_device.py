"""On the strict device, which stands in for a GPU: no tensors of two devices meet, nothing waits, and kernels stay within budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.utils.backend_registration")
RUNS = Path(__file__).with_name("strict_device_runs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the runs print, in a process of their own: the device stays for good."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices in Python")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(RUNS)],
        cwd=tmp_path_factory.mktemp("strict"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    content: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return content


def test_no_training_step_waits(found: dict[str, Any]) -> None:
    """Every scheme and option. What comes once in an epoch is the epoch's."""
    assert len(found["train"]) >= 16
    assert found["train"] == {name: {} for name in found["train"]}


def test_a_resumed_run_ends_with_the_same_weights(found: dict[str, Any]) -> None:
    assert found["resume"] == 0


def test_an_evaluation_step_waits_once_and_once_more_where_something_breaks(found: dict[str, Any]) -> None:
    assert found["evaluate"]["waits"] <= 2
    assert found["evaluate"]["same"]  # outcomes as on the CPU


# Kernels of an attack's step beside the network's, and of a pass of the PreAct ResNet-18 to the image.
BUDGETS = {"Linf": 31, "L2": 85, "L1": 70, "float32": 141, "bf16": 145}


@pytest.mark.parametrize("what", BUDGETS)
def test_kernels_stay_within_the_budget(what: str, found: dict[str, Any]) -> None:
    assert found["kernels"][what] <= BUDGETS[what]
