"""Random command lines of good and hostile values: each is accepted, or ends with one line, exit code 2 and no file left."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import eval as eval_script
import plot
import train
from benchmarks import compare_schemes
from config import EvalConfig, TrainConfig
from utils.cli import UsageError

HOSTILE = [
    "", " ", "-1", "0", "1", " 5", "1_000", "nan", "inf", "-inf", "1e308", "1e-320", "1" + "0" * 30, "9" * 4500, "\u0663", "0x10",
    "True", "None", "1/0", "8/0.0", "1/1/1", "8/255", "0.1 " * 3, "2 " * 3, "0.1 " * 1500, "\udcff", "a\udcffb", "a\0b", "a\nb",
    "$x$", "../..", "/", ".", "x" * 300, "x" * 5000, "%s", "{}", "@file", "--", "[1]", "null", "1e9", "1000001",
]  # fmt: skip
NORMS = ["Linf", "Linf L1", "L1 L1", "Linf L2 L1", "L3", "linf"]


class Accepted(UsageError):
    """The flags were taken; nothing is loaded or run. The scripts end with one line, which is the name of no flag."""


def stop(*_: Any, **__: Any) -> None:
    raise Accepted("flags", "taken")


def value_of(draw: random.Random, each: Any) -> str:
    good = [str(each.default)] * 4 if each.default not in (None, False) else ["3", "0.5"]
    choices = list(each.metadata.get("choices") or [])
    return draw.choice([*HOSTILE, *good, *choices, *(NORMS if "norms" in each.name else [])])


def script_flags(draw: random.Random, config: Any) -> list[str]:
    known = [each for each in fields(config) if "group" in each.metadata]
    chosen = draw.sample(known, draw.randint(1, 4))
    lines = [f"--{e.name}" if e.default is False else f"--{e.name}={value_of(draw, e)}" for e in chosen]
    start = ["--dataset=digits"] + (["--attack=apgd"] if config is TrainConfig and draw.random() < 0.5 else [])
    return [*start, *(["--model_name=net.pth"] if config is EvalConfig else []), *lines]


def plot_flags(draw: random.Random) -> list[str]:
    return [draw.choice(HOSTILE), f"--labels={draw.choice(HOSTILE)}", f"--save_dir={draw.choice(HOSTILE)}"]


def compare_flags(draw: random.Random) -> list[str]:
    names = draw.sample(["only", "baseline", "seeds", "train", "eval", "start", "data_dir", "save_dir"], 2)
    lines = [f"--{name}={draw.choice(HOSTILE)}" for name in names]
    return [
        draw.choice(["digits", *HOSTILE]),
        *draw.choice([[], [draw.choice(HOSTILE)], ["mine=" + draw.choice(HOSTILE)]]),
        *lines,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400))
def test_a_command_line_is_taken_or_refused_in_one_line(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", stop)
    monkeypatch.setattr(eval_script, "load_model", stop)
    for module in (train, eval_script):
        monkeypatch.setattr(module, "set_up_torch", lambda *_, **__: None)
    run, flags = [
        (train.main, script_flags(draw, TrainConfig)),
        (eval_script.main, script_flags(draw, EvalConfig)),
        (plot.main, plot_flags(draw)),
        (compare_schemes.main, compare_flags(draw)),
    ][(0, 0, 1, 1, 2, 3)[seed % 6]]
    try:
        run(flags)
    except Accepted:
        return
    except SystemExit as end:
        error = capsys.readouterr().err
        assert end.code == 2, flags  # noqa: PT017
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        assert not list(tmp_path.iterdir()), flags
    else:
        pytest.fail(f"it ran: {flags}")
