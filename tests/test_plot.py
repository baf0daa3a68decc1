"""plot.py: what is drawn is what the runs' files say."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import plot
import train
from plotting.networks import draw_tradeoff, each_alone, points
from plotting.runs import Run, read_run, short_labels
from plotting.style import COLOURS
from plotting.training import PANELS, draw_training

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row(accuracy: float) -> Record:
    return {"accuracy": accuracy, "low": accuracy - 9, "high": accuracy + 5, "points": 50}


def rows(clean: float) -> Record:
    names = ("clean", "Linf", "L2", "L1", "average", "union")
    return {name: row(clean - 3 * place) for place, name in enumerate(names)}


def record(epoch: int, norms: Sequence[str] = ("Linf", "L1"), tested: bool = False, **more: Any) -> Record:
    """An epoch as train.py writes it, with a key that plot.py does not know."""
    values = {"error": 0.5 / epoch, "running_error": 0.6 / epoch, "drawn": 1 / len(norms)}
    table = {norm: {"loss": (place + 1) / epoch, **values} for place, norm in enumerate(norms)}
    tables = {"eval": {"train": rows(70 + epoch), "test": rows(60 + epoch)}} if tested else {}
    return {
        "epoch": epoch,
        "lr": 0.1 / epoch,
        "loss": 3 / epoch,
        "error": 0.4,
        "norms": table,
        "new": 1,
        **tables,
        **more,
    }


def make_run(name: str, records: Sequence[Record], tail: str = "", **files: Record) -> Path:
    """A run folder; `files` are JSON files by name without .json."""
    folder = Path(name)
    folder.mkdir(parents=True)
    config = {"dataset": "digits", "eval_eps": [0.1, 0.4, 2.0]}
    for stem, content in ({"config": config} | files).items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records) + tail)
    return folder


def evaluation(clean: float, l1: float = 2.0, **settings: str) -> Record:
    radii = {"Linf": 0.1, "L2": 0.4, "L1": l1}
    norms = {norm: {"eps": eps} for norm, eps in radii.items()}
    return {"accuracy": rows(clean), "norms": norms, "settings": {"dataset": "digits", **settings}, "warnings": []}


def read(*folders: Path) -> list[Run]:
    return [read_run(folder, folder.name) for folder in folders]


def panels(figure: Figure) -> dict[str, Axes]:
    """By title, in the order in which they are seen."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def drawn(axes: Axes, **look: str) -> list[list[tuple[float, float]]]:
    """Points of the lines of this look: marker, color, linestyle, markerfacecolor."""
    lines = [line for line in axes.lines if all(getattr(line, f"get_{key}")() == look[key] for key in look)]
    return [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in lines]


def texts(figure: Figure) -> list[str]:
    """What all its legends say."""
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_a_runs_lines_are_its_metrics() -> None:
    figure = draw_training(read(make_run("a", [record(n, tested=n > 1) for n in (1, 2, 3)])))
    found = panels(figure)
    tested = ["accuracy, clean", *(f"accuracy, {n} (--eval_freq)" for n in ("Linf", "L2", "L1", "average", "union"))]
    assert list(found) == [*PANELS, *tested]
    blue, red = "#0072b2", "#d55e00"
    loss = found["training loss"]
    assert drawn(loss, marker="s", color=blue) == [[(1, 1), (2, 0.5), (3, pytest.approx(1 / 3))]]
    assert drawn(loss, marker="^", color=red) == [[(1, 2), (2, 1), (3, pytest.approx(2 / 3))]]
    assert drawn(loss, marker=".", color="#000000") == [[(1, 3), (2, 1.5), (3, 1)]]
    assert drawn(found["training error"], marker="s") == [[(1, 50), (2, 25), (3, pytest.approx(50 / 3))]]
    assert drawn(found["training error"], marker=".") == [[(1, 40), (2, 40), (3, 40)]]
    assert drawn(found["running error"], marker="^") == [[(1, 60), (2, 30), (3, pytest.approx(20))]]
    assert drawn(found["draw frequency"]) == [[(1, 50), (2, 50), (3, 50)]] * 2
    assert drawn(found["learning rate"]) == [[(1, 0.1), (2, 0.05), (3, pytest.approx(0.1 / 3))]]
    assert found["learning rate"].get_yscale() == "log"
    union = found["accuracy, union (--eval_freq)"]
    assert drawn(union, linestyle="-") == [[(2, 47), (3, 48)]]
    assert drawn(union, linestyle="--") == [[(2, 57), (3, 58)]]
    [band] = union.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices} == {(2, 38), (3, 39), (2, 52), (3, 53)}
    assert texts(figure) == [
        "all batches",
        "Linf",
        "L1",
        "test images",
        "training images",
        "95 % interval, test images",
    ]
    assert all(axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in found.values())


def test_several_runs_have_a_colour_each_and_norms_a_marker() -> None:
    long, short = (
        make_run("long", [record(n, tested=True) for n in range(1, 61)]),
        make_run("short", [record(1, ["L2"])]),
    )
    figure = draw_training(read(long, short, make_run("plain", [record(1, ["clean"]), record(2, ["clean"])])))
    loss = panels(figure)["training loss"]
    first, second, third = COLOURS[:3]
    assert [len(line) for line in drawn(loss, color=first)] == [60] * 3
    assert drawn(loss, color=second, marker="D") == [[(1, 1)]]
    assert drawn(loss, color=third, marker="o") == [[(1, 1), (2, 0.5)]]
    assert len(loss.lines) == 5  # a single norm's line is that of all batches
    assert [len(line) for line in drawn(panels(figure)["draw frequency"])] == [60, 60]
    rates = panels(figure)["learning rate"].lines
    assert [len(line.get_xdata()) for line in rates] == [60, 1, 2]
    widths = [line.get_linewidth() for line in rates]
    assert widths == sorted(set(widths), reverse=True)
    assert texts(figure)[:3] == ["long", "short", "plain"]
    assert not panels(figure)["accuracy, clean"].collections


def test_every_run_of_many_has_a_colour_of_its_own() -> None:
    figure = draw_training(read(*(make_run(f"run{n}", [record(1)]) for n in range(12))))
    assert len({str(line.get_color()) for line in panels(figure)["learning rate"].lines}) == 12


def test_one_epoch_is_seen_and_a_norm_that_was_not_drawn_is_left_out() -> None:
    first = record(1, ["Linf", "L1"])
    first["norms"]["L1"] = {"loss": None, "error": None, "running_error": 1.0, "drawn": 0.0}
    found = panels(draw_training(read(make_run("one", [first]))))
    for name, axes in found.items():
        assert all(line.get_marker() not in ("", "None", None) for line in axes.lines), name
        assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]
    for name in ("training loss", "training error", "running error"):
        assert drawn(found[name], marker="s"), name
        assert not drawn(found[name], marker="^"), name
    assert drawn(found["draw frequency"], marker="^") == [[(1, 0)]]
    later = panels(draw_training(read(make_run("two", [first, record(2)]))))
    assert drawn(later["training loss"], marker="^") == [[(2, 1)]]
    assert drawn(later["running error"], marker="^") == [[(2, 30)]]


def test_a_run_without_attack_and_an_unknown_norm() -> None:
    plain = record(1, ["clean"])
    plain["norms"]["clean"]["running_error"] = None
    found = panels(draw_training(read(make_run("plain", [plain]))))
    assert list(found) == ["training loss", "training error", "learning rate"]
    figure = draw_training(read(make_run("new", [record(1, ["Linf", "L0"])])))
    assert drawn(panels(figure)["training loss"], marker="X") == [[(1, 2)]]
    assert texts(figure) == ["all batches", "Linf", "L0"]


def test_averaged_weights_are_hollow() -> None:
    averaged = {"eval_ema": {"train": rows(95), "test": rows(90)}}
    figure = draw_training(read(make_run("ema", [record(1, tested=True, **averaged)])))
    clean = panels(figure)["accuracy, clean"]
    assert drawn(clean, linestyle="-.", markerfacecolor="white") == [[(1, 90)]]
    assert drawn(clean, linestyle=":", markerfacecolor="white") == [[(1, 95)]]
    assert drawn(clean, linestyle="-") == [[(1, 61)]]
    assert {"test images, EMA", "training images, EMA"} <= set(texts(figure))


def test_a_torn_last_line_is_left_out_and_another_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    [run] = read(make_run("torn", [record(1), record(2)], tail=json.dumps(record(3))[:40]))
    assert [line["epoch"] for line in run.records] == [1, 2]
    broken = make_run("broken", [record(1)], tail='{"epo\n' + json.dumps(record(3)) + "\n")
    assert "line 2 is not JSON" in usage_error([str(broken)], capsys)


def test_tradeoff_points_intervals_and_upper_bounds() -> None:
    full = make_run("full", [record(1, tested=True)], eval=evaluation(80), eval_ema=evaluation(90))
    quick = make_run("quick", [record(1, tested=True), record(2)])  # it was last tested in epoch 1
    fast = make_run("fast", [], eval=evaluation(70, attacks="fast"))
    found = list(points(read(full, quick, fast)))
    assert [point.label for point in found] == ["full", "full EMA", "quick", "fast"]
    figure = draw_tradeoff(each_alone(found), ["full", "quick", "fast"])
    [axes] = figure.axes
    blue, red, green = COLOURS[:3]
    assert drawn(axes, marker="o", color=blue, markerfacecolor=blue) == [[(80, 65)]]
    assert drawn(axes, marker="D", color=blue, markerfacecolor=blue) == [[(90, 75)]]
    assert drawn(axes, marker="o", color=red, markerfacecolor="white") == [[(61, 46)]]
    assert drawn(axes, marker="o", color=green, markerfacecolor="white") == [[(70, 55)]]
    bars = [[tuple(end) for end in lines.get_segments()[0]] for lines in axes.collections]
    assert bars[:2] == [[(71, 65), (85, 65)], [(80, 56), (80, 70)]]
    assert [text.get_text() for text in axes.texts] == ["full", "full EMA", "quick", "fast"]
    assert axes.get_title() == "digits: Linf 0.1, L2 0.4, L1 2"
    assert texts(figure) == ["full evaluation", "quick or fast attacks", "EMA", "95 % intervals"]


def test_what_cannot_be_compared_is_said() -> None:
    found = points(read(make_run("a", [], eval=evaluation(80)), make_run("b", [], eval=evaluation(80, l1=3))))
    [axes] = draw_tradeoff(each_alone(list(found)), ["a", "b"]).axes
    assert axes.get_title() == "settings differ: not comparable"
    assert "L1 3" in axes.texts[1].get_text()


def test_labels_of_close_points_do_not_cover_each_other() -> None:
    runs = read(*(make_run(f"a-rather-long-name-{n}", [], eval=evaluation(80 + n / 10)) for n in range(4)))
    [axes] = draw_tradeoff(each_alone(list(points(runs))), [run.label for run in runs]).axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * 4  # with itself


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["runs/digits_apgd_Linf_seed0"], ["digits_apgd_Linf_seed0"]),
        (["digits_apgd_Linf_seed0", "digits_apgd_L1_seed0"], ["Linf", "L1"]),
        (["digits_seed0", "digits_seed0_note"], ["default", "note"]),
        (["a/digits_seed0", "b/digits_seed0"], ["a/digits", "b/digits"]),
    ],
)
def test_labels_are_what_differs(names: list[str], short: list[str]) -> None:
    assert short_labels([Path(name) for name in names]) == short


def test_files_of_a_run_that_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset=digits", "--width=4", "--n_ex_train=60", "--epochs=1", "--device=cpu", "--attack=apgd"]
    folder = train.main([*flags, "--at_iter=1", "--eval_freq=1", "--n_ex_eval=4"])
    capsys.readouterr()
    written = plot.main([f"{folder}/"])
    assert written == [folder / name for name in ("training.png", "training.pdf", "tradeoff.png", "tradeoff.pdf")]
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in written]
    before = [path.read_bytes() for path in written]
    assert [data[:5] for data in before] == [b"\x89PNG\r", b"%PDF-"] * 2
    assert all(b"/FontFile2" in data and b"/Type3" not in data for data in before[1::2])  # TrueType
    plot.main([str(folder)])
    assert [path.read_bytes() for path in written] == before


def test_several_runs_go_to_plots_and_a_result_has_no_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a", [record(1)])
    make_run("b", [], eval=evaluation(80) | {"warnings": ["gradients vanish"]})
    assert [str(path) for path in plot.main(["a", "b", "--labels=$x$ _y"])] == [
        f"plots/{name}" for name in ("training.png", "training.pdf", "tradeoff.png", "tradeoff.pdf")
    ]
    out = capsys.readouterr().out
    assert "--final_eval): $x$\n" in out
    assert "WARNING: _y: gradients vanish" in out
    assert [path.name for path in plot.main(["a", "--save-dir=new/there"])] == ["training.png", "training.pdf"]
    assert "not in tradeoff" in capsys.readouterr().out
    assert [path.name for path in plot.main(["b"])] == ["tradeoff.png", "tradeoff.pdf"]


def usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        plot.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return error


@pytest.mark.parametrize(
    ("flags", "flag", "advice"),
    [
        ([], "RUN", "required"),
        (["absent"], "RUN", "absent is not a folder"),
        (["file"], "RUN", "file is not a folder"),
        (["empty"], "RUN", "neither eval.json nor a metrics.jsonl"),
        (["begun"], "RUN", "finished epoch"),
        (["other"], "RUN", "line 1 is no epoch"),
        (["damaged"], "RUN", "not a JSON file"),
        (["clean"], "RUN", "neither epochs nor a union"),
        (["good", "--labels=a b"], "--labels", "one for each RUN is needed, 1; got 2"),
        (["good", "--labels= "], "--labels", "at least one"),
        (["good", "--save_dir=file"], "--save_dir", "file"),
    ],
)
def test_usage_errors(flags, flag, advice, capsys) -> None:  # type: ignore[no-untyped-def]
    make_run("good", [record(1)])
    make_run("begun", [], tail='{"epoch": 1, "l')
    make_run("other", [], tail='{"step": 1}\n')
    make_run("clean", [], eval={"accuracy": {"clean": row(90)}, "norms": {}})
    (make_run("damaged", [record(1)]) / "eval.json").write_text("{")
    Path("empty").mkdir()
    Path("file").touch()
    error = usage_error(flags, capsys)
    assert flag in error
    assert advice in error


def test_help_says_each_flags_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plot.main(["--help"])
    assert stop.value.code == 0
    assert "python plot.py runs/RUN" in capsys.readouterr().out
    for action in plot.make_parser()._actions:
        assert action.help
        assert "(" in action.help or action.dest == "help" or action.help == "==SUPPRESS=="


def test_without_a_display_and_whatever_the_users_matplotlibrc_says(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a", [record(1, tested=True)])
    written = plot.main(["a"])
    before = [path.read_bytes() for path in written]
    Path("matplotlibrc").write_text("backend: tkagg\naxes.facecolor: red\ntext.usetex: True\nsavefig.dpi: 30\n")
    monkeypatch.delenv("DISPLAY", raising=False)
    subprocess.run([sys.executable, plot.__file__, "a"], check=True, capture_output=True)
    assert [path.read_bytes() for path in written] == before
