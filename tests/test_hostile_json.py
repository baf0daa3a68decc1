"""JSON that no program of ours wrote ends a script with one line, wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval as eval_script
import plot
import train
from utils.run_folder import parse_json, read_json


def one_line(main: Callable[[list[str]], Any], flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert len(error) < 1000
    return error


def test_each_file_is_refused(
    hostile_json: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for data in (*map(str.encode, hostile_json), b"\xff\xfe{}"):
        (run / "eval.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"eval\.json"):
            read_json(run / "eval.json")
        assert "eval.json" in one_line(plot.main, ["run"], capsys)
        assert "--baseline" in one_line(eval_script.main, ["--model_name=x.pth", "--baseline=run/eval.json"], capsys)
        (run / "config.json").write_bytes(data)
        assert "config.json" in one_line(train.main, ["--resume=run"], capsys)
        (run / "config.json").unlink()


LINE: dict[str, Any] = {
    "epoch": 1,
    "loss": 2.0,
    "lr": 0.1,
    "norms": {"L1": {"loss": 1.0}},
    "eval": {"test": {"union": {"accuracy": 3}}},
}
WRONG: list[Any] = [None, 3, -1e308, float("nan"), "text", [], [[1]], {}, {"L1": 3}, True, 10**29]


@pytest.mark.filterwarnings("ignore:.*log-scaled")
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.json", "config.json"])
def test_values_of_another_type_are_drawn_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each value of a file in turn."""
    monkeypatch.chdir(tmp_path)
    Path("metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    row = {"accuracy": 50.0, "low": 40.0, "high": 60.0, "points": 10}
    settings: dict[str, Any] = {
        "dataset": "digits",
        "model_name": "ep_1.pth",
        "attacks": "fast",
        "l_norms": ["L1"],
        "l_eps": [2.0],
    }
    whole = {
        "accuracy": {"clean": row, "union": row},
        "settings": settings,
        "norms": {"L1": {"eps": 2.0}},
        "warnings": [],
    }
    content: dict[str, Any] = {"metrics.jsonl": LINE, "eval.json": whole, "config.json": settings}[name]
    Path("eval.json").write_text(json.dumps(whole))
    for key in content:
        for value in WRONG:
            Path(name).write_text(json.dumps({**content, key: value}) + "\n")
            assert outcome(plot.main, [".", "--save_dir=pictures"]) in (0, 2)
            assert capsys.readouterr().err.count("\n") <= 1


def outcome(main: Callable[[list[str]], Any], flags: list[str]) -> Any:
    """The exit code."""
    try:
        main(flags)
    except SystemExit as end:
        return end.code
    return 0


def test_json_of_usual_depth_and_numbers_is_read() -> None:
    content = {"a": [1, -2, 3.5, None, True, {"b": [[["c"]]]}], "d": 2**63}
    assert parse_json(json.dumps(content)) == content
