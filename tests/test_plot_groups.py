"""plot.py's tables and bars, and seeds put together: the figures are those that numpy finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plot
from plotting.comparison import latex
from plotting.networks import by_group, draw_bars, draw_tradeoff, points
from plotting.runs import read_runs
from plotting.training import draw_training

N = 40
RADII = {"Linf": 8 / 255, "L1": 12.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def outcomes(seed: int, shift: float = 0.0) -> dict[str, list[int]]:
    """Harder from row to row."""
    draws = np.random.default_rng([seed, int(100 * shift)]).random(N)
    return {
        name: (draws < level + shift).astype(int).tolist()
        for name, level in (("clean", 0.8), ("Linf", 0.5), ("L1", 0.4), ("union", 0.3))
    }


def result(name: str, values: dict[str, list[int]], bound: bool = False, **settings: Any) -> Path:
    """A result folder of eval.py."""
    rows = {key: {"accuracy": 100 * float(np.mean(each)), "points": len(each)} for key, each in values.items()}
    for key, row in rows.items():
        row |= {"low": row["accuracy"] - 7, "high": row["accuracy"] + 8}
        row |= {"upper_bound": True} if bound and key != "clean" else {}
    content = {"accuracy": rows, "outcomes": values, "warnings": []}
    content["norms"] = {norm: {"eps": eps} for norm, eps in RADII.items()}
    content["settings"] = {"dataset": "cifar10", "attacks": "standard"} | settings
    Path(name).mkdir(parents=True)
    (Path(name) / "eval.json").write_text(json.dumps(content))
    return Path(name)


def cells(text: str) -> dict[str, list[str]]:
    """A Markdown table's rows by their first cell; of the last one with that cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def two() -> dict[str, list[dict[str, list[int]]]]:
    """Two networks of three seeds each."""
    found = {"eat": [outcomes(seed) for seed in range(3)], "max": [outcomes(seed, 0.1) for seed in range(3)]}
    for label, each in found.items():
        for seed, values in enumerate(each):
            result(f"results/eval_cifar10_run_{label}_width-8_seed{seed}_ep_3.pth_n{N}", values)
    return found


def folders() -> list[str]:
    return sorted(str(path) for path in Path("results").iterdir())


def test_seeds_are_a_row_and_differences_are_paired(
    two: dict[str, list[dict[str, list[int]]]], capsys: pytest.CaptureFixture[str]
) -> None:
    written = plot.main([*folders(), "--table=markdown", "--baseline=eat"])
    assert written[-1] == Path("plots/table.md")
    text = written[-1].read_text()
    assert text in capsys.readouterr().out
    assert f"cifar10: Linf 0.03137, L1 12; the first {N} test images, standard attacks." in text
    assert cells(text)["network"] == ["clean", "Linf 8/255", "L1 12", "union", "seeds"]
    for label, each in two.items():
        values = np.array([[100 * np.mean(seed[name]) for name in ("clean", "Linf", "L1", "union")] for seed in each])
        means, deviations = values.mean(0), values.std(0, ddof=1)
        first = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
        found = [f"{m:.1f} ± {d:.1f}" for m, d in zip(means, deviations, strict=True)]
        assert first.strip("| ").split(" | ")[1:] == [*found, "3"]
    union = 100.0 * np.array([np.subtract(b["union"], a["union"]) for a, b in zip(*two.values(), strict=True)])
    error = np.sqrt(union.mean(1).var(ddof=1) / 3 + union.mean(0).var(ddof=1) / N)
    assert cells(text)["max"][-2:] == [f"{union.mean():+.1f} ± {error:.1f}", "3"]
    assert "standard error over seeds and images" in text


def test_the_average_has_an_error_over_images(two: object) -> None:
    """Its outcomes are means over the norms; eval.json does not hold them."""
    for name, seed in (("a", 0), ("b", 1)):
        folder = result(name, outcomes(seed))
        content = json.loads((folder / "eval.json").read_text())
        content["accuracy"]["average"] = {"accuracy": 50.0 + seed, "low": 40.0, "high": 60.0, "points": N}
        (folder / "eval.json").write_text(json.dumps(content))
    text = plot.main(["a", "b", "--table=markdown", "--baseline=a"])[-1].read_text()
    means = [np.mean([outcomes(seed)[norm] for norm in ("Linf", "L1")], 0) for seed in (0, 1)]
    error = 100 * (means[1] - means[0]).std(ddof=1) / N**0.5
    assert f"+1.0 ± {error:.1f}" in text
    assert "standard error over images." in text


def test_errors_that_are_not_known_are_not_said() -> None:
    for name in ("a", "b"):
        folder = result(name, outcomes(0))
        content = json.loads((folder / "eval.json").read_text())
        del content["outcomes"]
        (folder / "eval.json").write_text(json.dumps(content))
    text = plot.main(["a", "b", "--table=markdown", "--baseline=a"])[-1].read_text()
    assert "are not known)" in text
    assert cells(text)["b"] == ["+0.0"] * 4 + ["1"]


def test_a_single_start_is_compared_with_every_seed(two: dict[str, list[dict[str, list[int]]]]) -> None:
    start = outcomes(9)
    result("start", start)
    names = [name for name in folders() if "_eat_" in name]
    labels = "--labels=start eat eat eat"
    text = plot.main(["start", *names, labels, "--table=markdown", "--baseline=start"])[-1].read_text()
    values = 100.0 * np.array([np.subtract(seed["union"], start["union"]) for seed in two["eat"]])
    error = np.sqrt(values.mean(1).var(ddof=1) / 3 + values.mean(0).var(ddof=1) / N)
    assert cells(text)["eat"][-2:] == [f"{values.mean():+.1f} ± {error:.1f}", "3"]


@pytest.mark.parametrize("name", ["n_iter", "class_order", "effort"])
def test_other_settings_of_the_evaluation_are_other_tables(name: str) -> None:
    for folder, value in (("a", 4), ("b", 100)):
        result(folder, outcomes(0), **{name: value})
    text = plot.main(["a", "b", "--table=markdown", "--baseline=a", "--bars"])[-1].read_text()
    assert text.startswith("Evaluations differ")
    assert f"attacks, {name} 4." in text
    assert "n_iter 100" not in text
    assert "minus" not in text
    [axes] = draw_bars(by_group(list(points(read_runs([Path("a"), Path("b")])))), ["a", "b"]).axes
    assert "not comparable" in axes.get_title()


def test_single_networks_have_intervals_and_upper_bounds_a_sign() -> None:
    ours, theirs = outcomes(0), outcomes(1)
    result("a", ours)
    result("b", theirs, bound=True)
    text = plot.main(["a", "b", "--labels=one|$ two_2", "--table=markdown", "--baseline=two_2"])[-1].read_text()
    union, clean = 100 * np.mean(theirs["union"]), 100 * np.mean(theirs["clean"])
    assert f"≤ {union:.1f} [{union - 7:.1f}, {union + 8:.1f}]" in text
    assert f"| {clean:.1f} [" in text
    assert "with 95 % interval; ≤: an upper bound" in text
    difference = 100.0 * np.subtract(ours["L1"], theirs["L1"])
    error = difference.std(ddof=1) / N**0.5
    assert f"{difference.mean():+.1f} ± {error:.1f}" in text
    assert "| one\\|$ |" in text
    assert r"two\_2" in text


def test_evaluations_that_differ_have_tables_of_their_own() -> None:
    result("a", outcomes(0))
    result("b", outcomes(1), attacks="quick")
    result("c", {name: values[:30] for name, values in outcomes(2).items()})
    text = plot.main(["a", "b", "c", "--table=markdown", "--baseline=a"])[-1].read_text()
    assert text.startswith("Evaluations differ")
    assert text.count("| network |") == 3
    assert "minus" not in text
    assert re.findall(r"\w+ attacks\.", text) == ["standard attacks.", "quick attacks.", "standard attacks."]


def test_latex_is_escaped(two: object) -> None:
    text = plot.main([*folders(), "--labels=" + "a_b% " * 3 + "x&y#" + " x&y#" * 2, "--table=latex"])[-1].read_text()
    assert r"a\_b\% &" in text
    assert r"x\&y\# &" in text
    assert r"$\pm$" in text
    tables = re.findall(r"\\begin\{tabular\}\{(l?r*)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert [columns for columns, _ in tables] == ["lrrrrr"]
    body = tables[0][1].split("\n")
    assert [line.replace(r"\&", "").count("&") for line in body if line.endswith(r"\\")] == [5] * 3
    assert all(line.startswith("%") for line in text.splitlines() if "attacks" in line)
    assert latex(["*a", "-1.5", "a--b---c"], [["[1]", "-b", "1"]])[2::2] == [
        r"{}*a & $-$1.5 & a-{}-b-{}-{}-c \\",
        r"{}[1] & -b & 1 \\",
        r"\end{tabular}",
    ]
    assert latex(["~^\\{}"], [])[2] == r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} \\"


def test_bars_and_points_of_several_seeds(two: dict[str, list[dict[str, list[int]]]]) -> None:
    networks = by_group(list(points(read_runs([Path(name) for name in folders()]))))
    assert [(network.label, len(network.points)) for network in networks] == [("eat", 3), ("max", 3)]
    figure = draw_bars(networks, ["eat", "max"])
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["clean", "Linf", "L1", "union"]
    means = [[np.mean([100 * np.mean(seed[name]) for seed in each]) for name in each[0]] for each in two.values()]
    heights = [[bar.get_height() for bar in container] for container in axes.containers[1::2]]
    assert np.allclose(heights, means)
    segments = axes.containers[0].lines[2][0].get_segments()
    unions = [100 * np.mean(seed["union"]) for seed in two["eat"]]
    assert np.allclose(segments[3][:, 1], np.mean(unions) + np.std(unions, ddof=1) * np.array([-1, 1]))
    [axes] = draw_tradeoff(networks, ["eat", "max"]).axes
    assert np.allclose([line.get_xydata()[0] for line in axes.lines], [[row[0], row[3]] for row in means])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["eat", "max", "standard deviation over seeds"]
    assert [path.name for path in plot.main([*folders(), "--bars", "--bands"])][2:] == ["bars.png", "bars.pdf"]


def run(name: str, losses: list[float]) -> Path:
    Path(name).mkdir()
    records = [{"epoch": epoch, "lr": 0.1, "loss": loss, "norms": {}} for epoch, loss in enumerate(losses, 1)]
    (Path(name) / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(name)


def test_bands_are_mean_and_deviation_where_all_seeds_are() -> None:
    names = [run("a_seed0", [3, 2, 1]), run("a_seed1", [5, 3]), run("b_seed0", [4, 4])]
    runs = read_runs(names)
    figure = draw_training(runs, ["training loss"], bands=True)
    [axes] = [axes for axes in figure.axes if axes.get_title()]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 4], [2, 2.5]], [[1, 4], [2, 4]]]
    [band] = axes.collections
    ends = band.get_paths()[0].vertices[:, 1]
    assert np.allclose([ends.min(), ends.max()], [2.5 - 0.5**0.5, 4 + 2**0.5])
    [part] = figure.subfigs
    said = [text.get_text() for text in part.legends[0].get_texts()]
    assert said == ["a", "b", "all batches", "standard deviation over seeds"]


def test_panels(capsys: pytest.CaptureFixture[str]) -> None:
    name = str(run("a", [3, 2]))
    assert [path.name for path in plot.main([name, "--panels=learning-rate"])] == ["training.png", "training.pdf"]
    figure = draw_training(read_runs([Path(name)]), ["learning rate"])
    assert [axes.get_title() for axes in figure.axes] == ["learning rate"]


ERRORS = [
    (["run", "--panels=loss"], "--panels", "training-loss"),
    (["res", "--panels=union"], "--panels", "no epochs"),
    (["run", "--table=latex"], "--table", "--final_eval"),
    (["run", "--bars"], "--bars", "--final_eval"),
    (["res", "--table=html"], "--table", "markdown"),
    (["res", "--table=latex", "--baseline=none"], "--baseline", "'res'"),
    (["res", "--baseline=res"], "--baseline", "--table"),
]


@pytest.mark.parametrize(("flags", "flag", "advice"), ERRORS)
def test_usage_errors(flags: list[str], flag: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", [3, 2])
    result("res", outcomes(0))
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as end:
        plot.main(flags)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "\n" not in said
    assert flag in said
    assert advice in said
    assert sorted(Path().rglob("*")) == before
