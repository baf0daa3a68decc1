"""benchmarks/compare_schemes.py: what it runs and not runs again, and that table and picture are what the runs say."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import compare_schemes, scheme_report
from benchmarks.scheme_report import Row, outcomes, packed
from plotting.comparison import standard_error

OWN = ["own", "eat=", "mine=--at_iter=20", "--seeds=0 1", "--train=--dataset=digits --attack=apgd --epochs=4"]
UNION = {"eat": [[1, 0, 1, 0], [1, 1, 0, 0]], "mine": [[1, 1, 1, 0], [1, 1, 1, 1]]}  # by seed, an image each


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the two scripts: each call is noted; passes follow from --at_iter, accuracies from scheme and seed."""
    noted: list[str] = []

    def train_main(argv: Sequence[str]) -> Path:
        noted.append("train " + " ".join(argv))
        flags = dict(flag[2:].partition("=")[::2] for flag in argv)
        if "act" in flags:
            raise SystemExit({"silu": "train.py: the loss is nan", "relu": 143}[flags["act"]])
        run = Path(flags["save_dir"]) / f"run_{flags.get('notes_run', 'start')}_{flags.get('seed', 0)}"
        run.mkdir(parents=True, exist_ok=True)
        steps, epochs = int(flags.get("at_iter", 10)), int(flags["epochs"])
        config = {"dataset": "digits", "epochs": epochs, "n_ex_train": 130, "batch_size": 64, "l_norms": ["L1"]}
        config |= {"ema": float(flags["ema"]) if "ema" in flags else None, "gradient_projection": False}
        record = {"passes": {"forward": steps + 2, "backward": steps + 1}, "seconds": 1.5}
        (run / "config.json").write_text(json.dumps(config))
        (run / "env.json").write_text(json.dumps({"commit": "c" * 40, "device": "cpu", "threads": 1}))
        (run / "metrics.jsonl").write_text("".join(json.dumps({"epoch": n + 1} | record) + "\n" for n in range(epochs)))
        return run

    def eval_main(argv: Sequence[str]) -> Path:
        noted.append("eval " + " ".join(argv))
        network = Path(dict(flag[2:].partition("=")[::2] for flag in argv)["model_name"])
        _, name, seed = network.parent.name.split("_")
        union = UNION[name][int(seed)]
        outcomes = {"clean": [1, 1, 1, 1], "L1": union, "union": union}
        rows = {row: {"accuracy": 25.0 * sum(values), "points": 4} for row, values in outcomes.items()}
        content = {"accuracy": rows, "outcomes": outcomes, "norms": {"L1": {"eps": 2.0}}, "warnings": [f"of {name}"]}
        Path("result").mkdir(exist_ok=True)
        Path("result/eval.json").write_text(json.dumps(content | {"environment": {"commit": "d" * 40}}))
        return Path("result")

    monkeypatch.setattr(compare_schemes.train, "main", train_main)
    monkeypatch.setattr(compare_schemes.eval_script, "main", eval_main)
    monkeypatch.setattr(scheme_report, "draw", lambda rows: Figure(figsize=(1, 1)))  # quick
    return noted


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def cells(folder: Path, start: str) -> list[list[str]]:
    """Of the table's lines whose first cell is `start`."""
    lines = [line.strip("| ").split(" | ") for line in (folder / "table.md").read_text().splitlines()]
    return [line for line in lines if line[0] == start]


def test_the_table_has_means_errors_costs_and_paired_differences(calls: list[str]) -> None:
    folder = compare_schemes.main(OWN)
    seeds, images = np.var([75, 100], ddof=1) / 2, np.var([100, 100, 100, 50], ddof=1) / 4
    error = math.sqrt(seeds + images)
    same = math.sqrt(np.var([100, 50, 50, 0], ddof=1) / 4)  # of eat: both seeds have 50 %
    assert cells(folder, "eat")[0] == [
        "eat",
        "100.0 ± 0.0",
        f"50.0 ± {same:.1f}",
        f"50.0 ± {same:.1f}",
        "12.0 + 11.0",
        "4",
        "0.28",
        "2",
    ]
    of_mine, difference = cells(folder, "mine")
    assert of_mine[1:5] == ["100.0 ± 0.0", f"87.5 ± {error:.1f}", f"87.5 ± {error:.1f}", "22.0 + 21.0"]
    per_image = np.array([[0, 1, 0, 0], [0, 0, 1, 1]]).mean(0) * 100  # mine minus eat, over the seeds
    error = math.sqrt(np.var([25, 50], ddof=1) / 2 + np.var(per_image, ddof=1) / 4)
    assert difference[1:] == ["+0.0 ± 0.0", *[f"+37.5 ± {error:.1f}"] * 2]
    text = (folder / "table.md").read_text()
    assert "digits: L1 2. Accuracy in % of the first 4 test images" in text
    assert "* mine (L1): `--at_iter=20`" in text
    assert text.count(": of mine") == 2
    assert [line.split()[0] for line in calls] == ["train", "eval"] * 4
    assert "--seed=0 --notes_run=eat --save_dir=results/own/runs --resume" in calls[0]
    assert "--model_name=results/own/runs/run_eat_0/ep_4.pth" in calls[1]


def test_what_is_finished_is_not_done_again(calls: list[str]) -> None:
    folder = compare_schemes.main(OWN)
    calls.clear()
    compare_schemes.main(OWN)
    assert calls == []
    kept = (folder / "results.jsonl").read_text().splitlines()[:3]
    (folder / "results.jsonl").write_text("\n".join([*kept, '{"scheme": "mine", "se']))  # cut off as it was written
    compare_schemes.main([*OWN, "--report_only"])
    assert calls == []
    assert "**Not finished**: mine (seed 1)." in (folder / "table.md").read_text()
    compare_schemes.main(OWN)
    assert [line.split()[0] for line in calls] == ["train", "eval"]
    calls.clear()
    compare_schemes.main([*OWN, "--seeds=0", "--only=mine", "--eval=--n_ex=9"])  # other flags are other jobs
    assert len(calls) == 4
    calls.clear()
    compare_schemes.main([*OWN, "--data_dir=here"])  # where files are is no part of a job
    assert calls == []


def test_a_scheme_that_fails_is_told_and_the_others_are_finished(calls: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"bad, seed 0: train\.py: the loss is nan"):
        compare_schemes.main([OWN[0], "bad=--act=silu", *OWN[1:], "--seeds=0"])
    assert {line["scheme"] for line in results(Path("results/own"))} == {"eat", "mine"}


def test_a_signal_ends_it(calls: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare_schemes.main([*OWN[:2], "bad=--act=relu", *OWN[2:], "--seeds=0"])
    assert end.value.code == 143
    assert len(calls) == 3


def test_a_start_is_fine_tuned_by_all_and_averaged_weights_are_evaluated(calls: list[str]) -> None:
    flags = [*OWN, "--seeds=0", "--start=--dataset=digits --epochs=2 --ema=0.9"]
    compare_schemes.main(flags)
    start = "results/own/start/run_start_0/ep_2_ema.pth"
    assert "--save_dir=results/own/start --resume" in calls[0]
    assert sum(f"--finetune_model --model_name={start}" in line for line in calls) == 2
    calls.clear()
    shutil.rmtree("results/own/start")
    compare_schemes.main(flags)  # lines tell the start by its flags: they are found again where its weights are not
    assert calls == []
    compare_schemes.main([*flags, "--start=--dataset=digits --epochs=2"])  # another start
    assert len(calls) == 5
    assert "all fine-tune `train.py --dataset=digits --epochs=2`;" in Path("results/own/table.md").read_text()


def test_outcomes_survive_packing() -> None:
    values = [1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    found = outcomes(
        {"points": 11, "outcomes": {"union": packed(values), "L1": packed(values), "L2": packed([1] * 11)}}
    )
    assert found["union"].tolist() == values
    assert found["average"].tolist() == [(value + 1) / 2 for value in values]
    assert Row("eat", [{"seed": 3, "points": 11, "accuracy": {}}]).results[3].outcomes == {}


def test_the_standard_error_adds_what_seeds_and_images_tell() -> None:
    """Of simulated outcomes it is the deviation of the mean difference over draws of both."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[float, float]:
        share = rng.random(200)  # how hard each image is
        better = rng.normal(0.05, 0.02, 3)  # by seed
        ours, theirs = ((rng.random((3, 200)) < share + each) for each in (better[:, None], 0))
        values = 100.0 * (ours * 1.0 - theirs)
        return float(values.mean()), standard_error([*values.mean(1)], [*values])

    means, errors = np.array([draw() for _ in range(400)]).T
    assert np.std(means) <= np.mean(errors) < 1.6 * np.std(means)
    assert math.isnan(standard_error([1.0], []))


def test_the_picture_shows_means_errors_and_names() -> None:
    def line(scheme: str, seed: int, clean: float, union: float) -> dict[str, Any]:
        costs = {"passes": {"forward": 12, "backward": 11}, "points": 100, "updates": 1000, "setting": "digits"}
        return {"scheme": scheme, "seed": seed, "accuracy": {"clean": clean, "union": union}, **costs}

    rows = [Row("eat", [line("eat", 0, 90, 40), line("eat", 1, 94, 44)]), Row("one", [line("one", 0, 80, 30)])]
    left, right = scheme_report.draw(rows).axes
    assert [line.get_xydata().tolist() for line in right.lines] == [[[92, 42]], [[80, 30]]]
    bar = right.containers[0][2][1].get_segments()[0]
    error = math.sqrt(8 / 2 + 42 * 58 / 99)  # of 40 and 44, and of 100 images
    assert bar[:, 1].tolist() == pytest.approx([42 - error, 42 + error])
    (one,) = right.containers[1][2][0].get_segments()  # of one seed: 80 % of 100 images
    error = math.sqrt(80 * 20 / 99)
    assert one[:, 0].tolist() == pytest.approx([80 - error, 80 + error])
    assert left.lines[0].get_xydata().tolist() == [[23, 42]]
    assert [[text.get_text() for text in axes.texts] for axes in (left, right)] == [["eat", "one"]] * 2


def test_the_scripts_as_they_are() -> None:
    tiny = "--dataset=digits --width=4 --n_ex_train=64 --epochs=1 --attack=apgd --at_iter=2"
    flags = ["tiny", "max", f"--train={tiny}", "--eval=--n_ex=8 --attacks=fast --n_iter=4", "--device=cpu"]
    folder = compare_schemes.main(flags)
    [line] = results(folder)
    assert line["accuracy"].keys() == {"clean", "Linf", "L2", "L1", "average", "union"}
    assert (line["epochs"], line["updates"], line["points"]) == (1, 1, 8)
    assert line["passes"] == {"forward": 10, "backward": 7}  # three attacks of two steps, the update
    assert line["setting"] == "digits: Linf 0.1, L2 0.4, L1 2"
    union = outcomes(line)["union"]
    assert 100 * union.mean() == line["accuracy"]["union"]
    assert {path.name for path in folder.iterdir()} >= {"table.md", "compare.png", "compare.pdf", "runs", "results"}
    compare_schemes.main([*flags, "--eval=--n_ex=8 --attacks=quick --n_iter=4"])  # another evaluation of the same run
    (folder / "results.jsonl").unlink()
    compare_schemes.main(flags)  # what was trained and evaluated is found again
    [again] = results(folder)
    assert {key: again[key] for key in ("accuracy", "outcomes")} == {key: line[key] for key in ("accuracy", "outcomes")}


COMMITTED = {  # flags of docs/schemes.md's commands, and the lines that their tables are made of
    "cifar10-narrow": "cifar10-narrow",
    "digits": "digits",
    "digits-equal-cost": "digits",
    "digits-optimization": "digits",
    "cifar10-finetune --train=--epochs=1": "cifar10-finetune",
}


@pytest.mark.parametrize("command", COMMITTED)
def test_committed_results_regenerate_the_tables(command: str) -> None:
    docs, flags = Path(__file__).parents[1] / "docs", shlex.split(command)
    Path(f"results/{flags[0]}").mkdir(parents=True)
    shutil.copy(docs / f"schemes/{COMMITTED[command]}.jsonl", f"results/{flags[0]}/results.jsonl")
    text = (compare_schemes.main([*flags, "--report_only"]) / "table.md").read_text()
    assert ("Not finished" in text) == (command == "cifar10-narrow")  # docs/schemes.md says what is missing there
    written = (docs / "schemes.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) >= 4
    assert [row for row in rows if row not in written] == []
    assert f"python benchmarks/compare_schemes.py {command}" in written


def test_docs_have_the_flags_of_each_scheme() -> None:
    written = (Path(__file__).parents[1] / "docs/schemes.md").read_text()
    assert [
        n for n, flags in compare_schemes.SCHEMES.items() if f"`{n}`" not in written or f"`{flags}`" not in written
    ] == []


ERRORS = [
    (["digit-epochs", "max"], "STUDY", "digits"),
    (["own", "--train=--dataset=digits"], "STUDY", "schemes"),
    ([*OWN, "a b=--act=relu"], "SCHEME", "letters"),
    ([*OWN, "a=--act='relu"], "SCHEME a", "quotation"),
    ([*OWN, "a=--act=wrong"], "SCHEME a", "--act"),
    ([*OWN, "a=--lr-schedule=wrong"], "SCHEME a", "piecewise"),
    ([*OWN, "a=--seed=3"], "SCHEME a", "--seeds"),
    ([*OWN, "--only=b"], "--only", "eat mine"),
    ([*OWN, "--baseline=b"], "--baseline", "eat mine"),
    ([*OWN, "--seeds=1 x"], "--seeds", "whole number"),
    ([*OWN, "--eval=--n_iter=1"], "--eval", "--n_iter"),
    ([*OWN, "--eval=--only_clean"], "--eval", "--only_clean"),
    ([*OWN, "--start=--epochs=x"], "--start", "--epochs"),
]


@pytest.mark.parametrize(("flags", "name", "what"), ERRORS)
def test_usage_errors(flags: list[str], name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare_schemes.main(flags)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "\n" not in said
    assert name in said
    assert what in said
    assert not Path("results").exists()


@pytest.mark.parametrize("study", compare_schemes.STUDIES)
def test_train_and_eval_take_the_flags_of_every_study(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compare_schemes.train, compare_schemes.eval_script):
        monkeypatch.setattr(module, "main", lambda *_: pytest.fail("nothing is to be done"))
    compare_schemes.main([study, "--report_only"])
