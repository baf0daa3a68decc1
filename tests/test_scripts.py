"""train.py and eval.py as a person runs them, on few points with a small network."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from config import EvalConfig, TrainConfig, make_parser

TINY = ["--dataset=digits", "--width=4", "--n_ex_train=150", "--batch_size=64", "--device=cpu"]
EAT = ["--attack=apgd", "--l_norms=Linf L1", "--at_iter=2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"ep_{epoch}.pth", weights_only=True)["state_dict"]


def test_eat_run_folder_metrics_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    folder = train.main([*TINY, *EAT, "--epochs=3", "--save_freq=2", "--notes_run=my note/7"])
    assert folder.name == (
        "digits_from-scratch_apgd_Linf-L1_width-4_n_ex_train-150_batch_size-64_at_iter-2_epochs-3_seed0_my-note-7"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "config.json",
        "env.json",
        "ep_2.pth",
        "ep_3.pth",
        "metrics.jsonl",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr_max"], config["lr_schedule"], config["l_eps"]) == (0.05, "piecewise-70-10", [0.1, 2.0])
    assert {"command", "commit", "packages", "device"} <= json.loads((folder / "env.json").read_text()).keys()
    records = lines(folder)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[0]["norms"].keys() == {"Linf", "L1"}
    assert sum(row["drawn"] for row in records[0]["norms"].values()) == pytest.approx(1, abs=1e-3)
    assert "epoch 3/3" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_weights_in_a_folder_of_its_own() -> None:
    first, second = train.main([*TINY, *EAT, "--epochs=1"]), train.main([*TINY, *EAT, "--epochs=1"])
    other = train.main([*TINY, *EAT, "--epochs=1", "--seed=1"])
    assert second.name == first.name + "-2"
    assert all(torch.equal(a, b) for a, b in zip(weights(first, 1).values(), weights(second, 1).values(), strict=True))
    assert not torch.equal(weights(first, 1)["conv1.weight"], weights(other, 1)["conv1.weight"])


def test_standard_training_is_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    folder = train.main([*TINY, "--l_norms=Linf L1", "--epochs=1"])
    assert "no-attack" in folder.name
    assert "STANDARD TRAINING" in capsys.readouterr().out
    assert lines(folder)[0]["norms"].keys() == {"clean"}


def test_fine_tuning_evaluation_and_final_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    sgd = ["--epochs=3", "--batch_size=32", "--lr-max=0.1", "--lr-schedule=superconverge"]
    start = train.main(
        ["--dataset=digits", "--width=4", *sgd, "--attack=apgd", "--l_norms=L2", "--l_eps=1/9", "--at-iter=1"]
    )
    flags = [
        "--dataset=digits",
        "--n_ex_train=100",
        "--finetune-model",
        f"--model_name={start}/ep_3.pth",
        "--save_optim",
    ]
    tuned = train.main(
        [*flags, *EAT, "--final_eval", "--n_ex_final=12", "--eval_freq=2", "--n_ex_eval=10", "--eval_eps=0.5 4 30"]
    )
    config = json.loads((tuned / "config.json").read_text())
    assert (config["epochs"], config["lr_max"], config["lr_schedule"]) == (3, 0.05, "piecewise-ft")
    assert config["network"]["width"] == 4
    records = lines(tuned)
    assert [record["lr"] for record in records] == pytest.approx([0.05, 0.005, 0.0005])
    assert ["eval" in record for record in records] == [False, True, True]
    assert list(records[1]["eval"]["test"]) == ["clean", "Linf", "L2", "L1", "average", "union"]
    assert "optimizer" in torch.load(tuned / "ep_3.pth", weights_only=True)
    assert json.loads((tuned / "eval.json").read_text())["accuracy"]["union"]["points"] == 12
    capsys.readouterr()
    eval_script.main(
        [f"--model_name={tuned}/ep_3.pth", "--n_ex=12", "--save_dir=out", "--l_norms=Linf L2 L1", "--l_eps=0.5 4 30"]
    )
    [again] = Path("out").glob("*/eval.json")
    # From its file the network gives the figures that it gave in memory.
    assert json.loads(again.read_text())["accuracy"] == json.loads((tuned / "eval.json").read_text())["accuracy"]
    images = sorted(path.name for path in again.parent.glob("adv_*"))
    assert images == ["adv_L1_30.npy", "adv_L2_4.npy", "adv_Linf_0.5.npy"]
    assert "union" in capsys.readouterr().out


def test_a_function_of_ones_own_is_tuned_and_evaluated() -> None:
    Path("nets.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    tuned = train.main(["--dataset=digits", "--finetune_model", "--model_name=nets.py:make", "--n_ex_train=100", *EAT])
    assert json.loads((tuned / "config.json").read_text())["lr_max"] == 0.01
    eval_script.main([f"--model_name=nets.py:make@{tuned}/ep_3.pth", "--only_clean", "--save_dir=out"])
    [result] = Path("out").glob("*/eval.json")
    assert list(json.loads(result.read_text())["accuracy"]) == ["clean"]


def test_lr_no_decay_keeps_the_published_constant_rate() -> None:
    folder = train.main(
        [*TINY, "--epochs=2", "--lr_no_decay=1.0", "--lr-max=0.01", "--lr-schedule=piecewise", "--save_optim"]
    )
    groups = torch.load(folder / "ep_2.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [pytest.approx(1e-4), 1.0]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]


def test_a_norm_that_is_never_drawn_in_an_epoch_has_null_figures() -> None:
    folder = train.main([*TINY, *EAT, "--epochs=1", "--n_ex_train=10"])
    rows = lines(folder)[0]["norms"].values()
    assert sorted(row["loss"] is None for row in rows) == [False, True]
    assert all(math.isfinite(row["loss"]) for row in rows if row["loss"] is not None)


def test_a_run_that_diverges_says_where_and_keeps_its_last_good_state() -> None:
    with pytest.raises(
        SystemExit,
        match=r"loss of batch 2 of epoch 1 \(L2 0.4\) is nan.*good state is.*state_0000_000000.*--lr-max.*--grad_clip",
    ):
        train.main([*TINY, "--attack=apgd", "--l_norms=L2", "--at_iter=1", "--epochs=2", "--lr-max=1e30"])
    [state] = Path("runs").glob("*/state_*.pth")
    content = torch.load(state, weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in content["state_dict"].values())
    folder = train.main(
        [
            *TINY,
            "--attack=apgd",
            "--l_norms=L2",
            "--at_iter=1",
            "--epochs=1",
            "--lr-max=1e30",
            "--grad_clip=1e-31",
            "--weight_decay=0",
        ]
    )
    assert all(bool(tensor.isfinite().all()) for tensor in weights(folder, 1).values())


def test_weights_that_are_not_finite_are_never_saved() -> None:
    """The last loss before a save is finite, the step after it is not."""
    flags = ["--dataset=digits", "--width=4", "--n_ex_train=64", "--batch_size=64", "--epochs=1"]
    with pytest.raises(SystemExit, match=r"weights are not finite.*good state is.*state_0000_000000"):
        train.main([*flags, "--lr-max=3e38", "--weight_decay=1e30"])
    assert not list(Path("runs").glob("*/ep_*"))


@pytest.mark.parametrize(("script", "config"), [(train, TrainConfig), (eval_script, EvalConfig)])
def test_help_says_each_flags_default(script, config, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "network:" in capsys.readouterr().out
    for action in make_parser(config, None)._actions:
        assert "(" in action.help or action.dest == "help" or action.help == "==SUPPRESS=="


@pytest.mark.parametrize("script", ["train.py", "eval.py", "plot.py"])
def test_without_its_packages_a_script_says_one_line(script: str) -> None:
    """-S: Python without site-packages."""
    path = Path(train.__file__).parent / script
    run = subprocess.run([sys.executable, "-S", path], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "lacks torch" in run.stderr
    assert "source .venv/bin/activate" in run.stderr


@pytest.mark.parametrize(
    ("flags", "norms", "passes"),
    [
        (["--multinorm=eat-mixed"], ["Linf", "L1"], (4, 3)),
        (["--multinorm=sat"], ["Linf", "L2", "L1"], (4, 3)),
        (["--multinorm=avg"], ["Linf", "L2", "L1"], (12, 9)),
        (["--multinorm=max"], ["Linf", "L2", "L1"], (10, 7)),
        (["--multinorm=msd", "--l_norms=L1 Linf"], ["L1", "Linf"], (7, 3)),
        (["--multinorm=ramp"], ["Linf", "L1"], (8, 6)),
        (["--loss=trades"], ["Linf", "L1", "clean"], (5, 4)),
        (["--multinorm=max", "--l_norms=Linf L1", "--loss=trades"], ["Linf", "L1", "clean"], (8, 6)),
        (["--multinorm=ramp", "--gradient_projection", "--init_epochs=0"], ["Linf", "L1", "clean"], (4.5, 3.5)),
    ],
)
def test_every_scheme_trains_and_says_what_it_cost(
    flags: list[str], norms: list[str], passes: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and backward passes an image: those of the attacks with two steps, and of the update."""
    folder = train.main([*TINY, "--attack=apgd", "--at_iter=2", "--epochs=2", *flags])
    for record in lines(folder):
        assert list(record["norms"]) == norms
        assert (record["passes"]["forward"], record["passes"]["backward"]) == passes
        drawn = [row["drawn"] for name, row in record["norms"].items() if name != "clean"]
        assert sum(drawn) == pytest.approx(1, abs=1e-3)
        assert all(math.isfinite(row["loss"]) for row in record["norms"].values() if row["drawn"])
    name = flags[0].removeprefix("--multinorm=") if "multinorm" in flags[0] else "eat"
    assert f"{name} for Linf" in capsys.readouterr().out.replace("L1 2, Linf", "Linf")


def test_first_epochs_of_standard_training() -> None:
    folder = train.main([*TINY, *EAT, "--epochs=3", "--init_epochs=2"])
    first, second, third = lines(folder)
    for record in (first, second):
        assert record["norms"]["clean"]["loss"] == record["loss"]
        assert record["norms"]["Linf"]["drawn"] == record["norms"]["L1"]["drawn"] == 0
        assert record["passes"] == {"forward": 1, "backward": 1}
    assert list(third["norms"]) == ["Linf", "L1"]
