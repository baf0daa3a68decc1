"""benchmarks/compare_schemes.py: what it runs and not runs again, and that table and picture are what the runs say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import compare_schemes, scheme_report

# Stand-ins for the two scripts: each call is noted in ./calls, passes follow from --at_iter, accuracies from scheme and seed.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(flag[2:].partition("=")[::2] for flag in sys.argv[1:])
with open("calls", "a") as file:
    file.write("train " + " ".join(sys.argv[1:]) + "\\n")
if flags.get("act") == "silu":
    print("a long story", "the loss is nan", sep="\\n", file=sys.stderr)
    sys.exit(3)
if flags.get("act") == "relu":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
steps, epochs = int(flags.get("at_iter", 10)), int(flags["epochs"])
run = Path(flags["save_dir"]) / f"run-{time.time_ns()}"
run.mkdir(parents=True)
config = {"dataset": "digits", "epochs": epochs, "seed": int(flags.get("seed", 0)), "n_ex_train": 130, "batch_size": 64, "l_norms": ["L1"]}
config["ema"] = float(flags["ema"]) if "ema" in flags else None
config["gradient_projection"] = "gradient_projection" in flags
config |= {"scheme": flags.get("notes_run", "")}


def value(name, text):  # as config.flags_given has it
    if name in ("l_norms", "l_iters"):
        return [int(word) if word.isdecimal() else word for word in text.split()]
    number = text.replace(".", "", 1).isdecimal()
    return not text or ((float(text) if "." in text else int(text)) if number else text)


config["asked"] = {name.replace("-", "_"): value(name, text) for name, text in flags.items()}
env = {"command": ["train.py", *sys.argv[1:]], "commit": "c" * 40, "device": "cpu", "threads": int(os.environ["OMP_NUM_THREADS"])}
passes = {"forward": steps + 2, "backward": steps + 1}
for name, content in (("env", env), ("config", config)):
    (run / f"{name}.json").write_text(json.dumps(content))
for epoch in range(epochs):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": epoch + 1, "passes": passes, "seconds": 1.5}) + "\\n")
(run / f"ep_{epochs}.pth").touch()
if config["ema"]:
    (run / f"ep_{epochs}_ema.pth").touch()
"""
EVAL = """
import json, sys
from pathlib import Path
flags = dict(flag[2:].partition("=")[::2] for flag in sys.argv[1:])
with open("calls", "a") as file:
    file.write("eval " + " ".join(sys.argv[1:]) + "\\n")
assert Path(flags["model_name"]).exists()
config = json.loads((Path(flags["model_name"]).parent / "config.json").read_text())
union = {"eat": [40, 44], "mine": [47, 43]}.get(config["scheme"], [30, 30])[config["seed"]]
rows = {"clean": 90 + config["seed"], "Linf": 60, "L2": 70, "L1": 50, "average": 60, "union": union}
folder = Path(flags["save_dir"]) / "result"
folder.mkdir(parents=True, exist_ok=True)
content = {"accuracy": {name: {"accuracy": value, "points": 8} for name, value in rows.items()}, "warnings": []}
content |= {"norms": {"Linf": {"eps": 0.1}, "L1": {"eps": 2.0}}, "environment": {"commit": "c" * 40}}
(folder / "eval.json").write_text(json.dumps(content))
"""
OWN = ["own", "eat=", "mine=--at_iter=20", "--seeds=0 1", "--train=--dataset=digits --attack=apgd --epochs=4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAIN)
    (tmp_path / "scripts" / "eval.py").write_text(EVAL)
    monkeypatch.setattr(compare_schemes, "ROOT", tmp_path / "scripts")
    monkeypatch.setattr(scheme_report, "draw", lambda rows: Figure(figsize=(1, 1)))  # quick


def calls() -> list[str]:
    """What was run since the last time, and with which flags."""
    path = Path("calls")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def scripts_of(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def cells(folder: Path, start: str) -> list[list[str]]:
    """Of the table's lines whose first cell is `start`."""
    lines = [line.strip("| ").split(" | ") for line in (folder / "table.md").read_text().splitlines()]
    return [line for line in lines if line[0] == start]


@pytest.mark.usefixtures("stubs")
def test_the_table_is_mean_deviation_and_paired_differences_of_two_schemes_and_two_seeds() -> None:
    folder = compare_schemes.main([*OWN, "--jobs=2"])
    assert folder == Path("results/own")
    lines = results(folder)
    assert sorted((line["scheme"], line["seed"]) for line in lines) == [
        ("eat", 0),
        ("eat", 1),
        ("mine", 0),
        ("mine", 1),
    ]
    assert {line["threads"] for line in lines} == {max(1, torch.get_num_threads() // 2)}
    assert scripts_of(sorted(calls())) == ["eval"] * 4 + ["train"] * 4
    costs = ["0.500", "4"]  # 1.5 s an epoch of 3 updates (130 points in batches of 64), 4 epochs
    norms = ["60.0 ± 0.0", "70.0 ± 0.0", "50.0 ± 0.0", "60.0 ± 0.0"]
    eat, mine = cells(folder, "eat"), cells(folder, "mine")
    assert eat == [["eat", "90.5 ± 0.7", *norms, "42.0 ± 2.8", "12.0 + 11.0", *costs, "0.28", "2"]]  # 23 x 12 / 1000
    assert mine[0] == ["mine", "90.5 ± 0.7", *norms, "45.0 ± 2.8", "22.0 + 21.0", *costs, "0.52", "2"]
    zeros = ["+0.0 ± 0.0"] * 4
    assert mine[1] == ["mine", "+0.0 ± 0.0", *zeros, "+3.0 ± 4.0", "2"]  # +7 and -1
    text = (folder / "table.md").read_text()
    assert "digits: Linf 0.1, L1 2" in text
    assert "first 8 test points" in text
    assert (
        "`train.py --dataset=digits --attack=apgd --epochs=4 --seed=SEED` and\n\n* eat (L1): nothing else\n* mine (L1): `--at_iter=20`"
        in text
    )
    assert "Not finished" not in text


@pytest.mark.usefixtures("stubs")
def test_what_is_finished_is_not_done_again() -> None:
    folder = compare_schemes.main(OWN)
    before, table = results(folder), (folder / "table.md").read_text()
    calls()
    compare_schemes.main(OWN)
    assert calls() == []
    assert (folder / "table.md").read_text() == table
    kept = [json.dumps(line) for line in before if (line["scheme"], line["seed"]) != ("mine", 1)]
    (folder / "results.jsonl").write_text("\n".join([*kept, '{"scheme": "mine", "se']))  # cut off as it was written
    compare_schemes.main([*OWN, "--report_only"])
    assert calls() == []
    assert "**Not finished**: mine_seed1." in (folder / "table.md").read_text()
    assert cells(folder, "mine")[1][-2:] == ["+7.0", "1"]  # one seed: no standard error
    compare_schemes.main(OWN)
    assert scripts_of(calls()) == ["eval"]  # its run was complete
    last = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    assert {**last, "date": ""} == {**next(line for line in before if line["run"] == last["run"]), "date": ""}
    assert (folder / "table.md").read_text() == table


@pytest.mark.usefixtures("stubs")
def test_a_scheme_of_ones_own_and_other_flags_are_new_runs() -> None:
    folder = compare_schemes.main([*OWN, "--only=eat"])
    assert scripts_of(calls()) == ["train", "eval"] * 2
    compare_schemes.main([*OWN, "new=--lr-max=0.2 --l_norms='Linf L1'", "--only=new"])
    done = calls()
    assert scripts_of(done) == ["train", "eval"] * 2  # not eat
    assert all("--epochs=4 --lr-max=0.2 --l_norms=Linf L1 --seed=" in line for line in done if line[0] == "t")
    assert [row[0] for row in cells(folder, "new")] == ["new", "new"]  # a row of each table
    compare_schemes.main([*OWN, "--eval=--n_ex=9", "--only=eat"])
    assert scripts_of(calls()) == ["eval"] * 2
    compare_schemes.main([*OWN, "--train=--dataset=digits --epochs=5", "--eval=--n_ex=9", "--only=eat", "--seeds=1"])
    assert scripts_of(calls()) == ["train", "eval"]
    assert len(results(folder)) == 7
    assert len(cells(folder, "eat")) == 1


@pytest.mark.usefixtures("stubs")
def test_a_scheme_that_fails_is_told_and_the_others_are_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare_schemes.main([*OWN, "bad=--act=silu"])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.count("bad_seed") == 2 * 2  # its name and its log's
    assert "train.py ended with 3, the end of results/own/logs/bad_seed1.log:\n$ python train.py --dataset" in said
    assert "the loss is nan" in said
    folder = Path("results/own")
    assert len(results(folder)) == 4
    assert "**Not finished**: bad_seed0, bad_seed1." in (folder / "table.md").read_text()


@pytest.mark.usefixtures("stubs")
def test_a_signal_ends_the_processes_and_begins_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare_schemes.main([*OWN, "slow=--act=relu", "--only=slow"])
    assert end.value.code == 143
    assert "SIGTERM: the same command goes on" in capsys.readouterr().out
    assert scripts_of(calls()) == ["train", "eval", "train"]


@pytest.mark.usefixtures("stubs")
def test_equal_cost_scales_the_epochs_by_measured_passes() -> None:
    folder = compare_schemes.main(
        [
            *OWN,
            "--equal_cost",
            "fixed=--epochs=9 --at_iter=20",
            "late=--init_epochs=3",
            "halves=--gradient_projection",
            "--seeds=0",
        ]
    )
    assert {line["scheme"]: line["epochs"] for line in results(folder)} == {
        "eat": 4,
        "mine": 2,  # 4 x 23 / 43
        "fixed": 9,
        "late": 7,  # 3 + (4 x 23 - 3 x 2) / 23
        "halves": 2,
    }
    assert {line["scheme"]: line["updates"] for line in results(folder)}["halves"] == 12  # 2 epochs, twice 3 batches
    probes = [line for line in calls() if "/probes " in line]
    assert len(probes) == 4
    compare_schemes.main([*OWN, "--equal_cost", "--seeds=0"])
    assert calls() == []
    compare_schemes.main([*OWN, "--equal_cost", "--seeds=0", "huge=--at_iter=500", "--only=huge"])
    assert results(folder)[-1]["epochs"] == 1
    assert "at the cost of 4 epochs of eat" in (folder / "table-equal_cost.md").read_text()
    calls()
    compare_schemes.main([*OWN, "--seeds=0"])
    assert scripts_of(calls()) == ["train", "eval"]  # mine; eat is the run that it was at equal cost


@pytest.mark.usefixtures("stubs")
def test_with_ema_the_averaged_weights_are_evaluated() -> None:
    compare_schemes.main([*OWN, "averaged=--ema=0.9", "--only=averaged", "--seeds=0"])
    assert [line.split("--model_name=")[1].split()[0].rpartition("/")[2] for line in calls() if line[0] == "e"] == [
        "ep_4.pth",
        "ep_4_ema.pth",
    ]


@pytest.mark.usefixtures("stubs")
def test_a_start_is_trained_once_and_fine_tuned_by_all() -> None:
    start = "--start=--dataset=digits --l_norms=Linf --epochs=2"
    compare_schemes.main([*OWN, start])
    done = calls()
    assert "train --dataset=digits --l_norms=Linf --epochs=2 --save_dir=results/own/start --resume" in done
    [run] = Path("results/own/start").iterdir()
    tuned = f"--finetune_model --model_name={run}/ep_2.pth"
    assert sum(tuned in line for line in done if line[0] == "t") == 4
    compare_schemes.main([*OWN, start])
    assert calls() == []


@pytest.mark.usefixtures("stubs")
def test_where_files_are_is_no_part_of_a_run() -> None:
    folder = compare_schemes.main([*OWN, "--seeds=0", "--data_dir=here", "--model_dir=there"])
    assert all("--data_dir=here --model_dir=there" in line for line in calls())
    assert "there" not in (folder / "results.jsonl").read_text()
    compare_schemes.main([*OWN, "--seeds=0", "--model_dir=elsewhere"])
    assert calls() == []


def test_the_scripts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--dataset=digits --width=4 --n_ex_train=64 --epochs=1 --attack=apgd --at_iter=2"
    flags = ["tiny", "max", f"--train={tiny}", "--eval=--n_ex=8 --attacks=fast --n_iter=4", "--device=cpu"]
    folder = compare_schemes.main(flags)
    [line] = results(folder)
    assert line["accuracy"].keys() == {"clean", "Linf", "L2", "L1", "average", "union"}
    assert (line["epochs"], line["updates"], line["points"]) == (1, 1, 8)
    assert line["passes"] == {"forward": 10, "backward": 7}  # three attacks of two steps, the update; README
    assert line["setting"] == "digits: Linf 0.1, L2 0.4, L1 2"
    evaluation = json.loads((folder / line["result"] / "eval.json").read_text())
    assert line["accuracy"]["union"] == evaluation["accuracy"]["union"]["accuracy"]
    assert evaluation["settings"]["model_name"] == f"{folder / line['run']}/ep_1.pth"
    assert {path.name for path in folder.iterdir()} >= {"table.md", "compare.png", "compare.pdf", "runs", "logs"}
    assert capsys.readouterr().out.count("max_seed0: clean") == 1


def line_of(scheme: str, seed: int, clean: float, union: float, forward: float | None) -> dict[str, Any]:
    passes = {"forward": forward, "backward": 11} if forward else None
    accuracy = {"clean": clean, "union": union}
    return {
        "scheme": scheme,
        "seed": seed,
        "accuracy": accuracy,
        "passes": passes,
        "points": 100,
        "updates": 1000,
        "setting": "digits",
    }


def test_the_picture_shows_means_deviations_and_names() -> None:
    rows = [
        scheme_report.Row("eat", [line_of("eat", 0, 90, 40, 12), line_of("eat", 1, 94, 44, 12)]),
        scheme_report.Row("old", [line_of("old", 0, 80, 30, None)]),  # by a train.py that did not count passes
    ]
    left, right = scheme_report.draw(rows).axes
    assert [line.get_xydata().tolist() for line in right.lines] == [[[92, 42]], [[80, 30]]]
    bar = right.containers[0][2][1].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([42 - 8**0.5, 42 + 8**0.5])
    (old,) = right.containers[1][2][0].get_segments()  # of one seed: 80 % of 100 points
    assert old[:, 0].tolist() == pytest.approx([80 - 4, 80 + 4])
    assert left.lines[0].get_xydata().tolist() == [[23, 42]]
    assert [[text.get_text() for text in axes.texts] for axes in (left, right)] == [["eat"], ["eat", "old"]]


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
    ([*OWN, "--jobs=0"], "--jobs", "at least 1"),
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
    planned: list[compare_schemes.Plan] = []
    found: Callable[..., Any] = lambda scripts, plan: planned.append(plan) or ([], {})  # noqa: E731
    monkeypatch.setattr(compare_schemes, "all_jobs", found)
    compare_schemes.main([study, "--report_only"])
    assert planned[0].baseline == "eat"
    assert max(planned[0].epochs.values()) == (30 if study == "digits" else 3)
