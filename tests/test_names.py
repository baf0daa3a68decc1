"""Names that people choose show as text: in pages, pictures, and on any console. And what --amp=bf16 says on a slow processor."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from evaluation.report import write_report
from utils import precision
from utils.pictures import as_text, picture_style
from utils.text import printable

ODD = [
    r"$\frac$", "$", "_^{}", "<script>alert(1)</script>", "a&b", "'\"", "line\nbreak", "\x1b[31m", "\udce9",
    "\u05e9\u05dc\u05d5\u05dd", "\u202eabc", "\U0001f600", "x" * 5000, "100%", "",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_name_is_one_line_of_text(name: str) -> None:
    for shown in (printable(name), as_text(name)):
        assert "\n" not in shown
        assert "\x1b" not in shown
        shown.encode()
    assert len(as_text(name)) <= 400


@pytest.mark.parametrize("name", ODD)
def test_a_picture_draws_it(name: str) -> None:
    with picture_style():
        figure = Figure()
        axes = figure.subplots()
        [line] = axes.plot([1], label=as_text(name))
        axes.set(title=as_text(name), xlabel=as_text(name))
        axes.set_xticks([0], [as_text(name)])
        figure.legend(handles=[line])
        figure.canvas.draw()  # warnings are errors: of missing glyphs too


def test_the_page_shows_names_as_text(tmp_path: Path) -> None:
    rows = {"clean": {"accuracy": 50.0, "low": 1.0, "high": 99.0, "points": len(ODD)}}
    content = {
        "accuracy": rows, "outcomes": {"clean": [1] * len(ODD)}, "norms": {}, "warnings": ["<b>\udce9"], "seconds": 1.0,
        "settings": {"model_name": "<script>\udcff$", "n_ex": len(ODD), "dataset": "digits", "attacks": "fast", "n_iter": 4},
        "environment": {"command": ["eval.py", "--x=<i>\n"], "started": "now", "device": "cpu", "packages": {"torch": "2"}, "commit": "0"},
    }  # fmt: skip
    write_report(tmp_path / "report.html", content, list(range(len(ODD))), ODD, [])
    page = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;\\udcff$" in page
    assert "&lt;b&gt;\\udce9" in page
    assert base64.b64decode(page.split("base64,")[1].split('"')[0]).startswith(b"\x89PNG")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_console_prints_them(encoding: str) -> None:
    code = "from utils.cli import usage_errors\nwith usage_errors('x'):\n    print('\\udce9 \\u05e9 \\u00b1')"
    env = {"PYTHONIOENCODING": encoding, "PATH": ""}
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert b"\\udce9" in run.stdout


def test_bf16_without_instructions_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    precision.check_amp(torch.device("cpu"), "off")
    assert not capsys.readouterr().out
    precision.check_amp(torch.device("cpu"), "bf16")
    assert "no bfloat16 instructions" in capsys.readouterr().out
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        precision.check_amp(torch.device("cpu"), "bf16")
        assert bool(capsys.readouterr().out) != has
