"""Configurations: published settings, config.json, and which run a command resumes."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from attacks.multinorm import SCHEMES
from config import (
    EvalConfig,
    TrainConfig,
    config_from_json,
    config_json,
    flags_given,
    make_parser,
    resolved,
    resumed,
    run_name,
    same_command,
    scheme_of,
)


def given(*flags: str) -> dict[str, Any]:
    return flags_given(make_parser(TrainConfig, None), flags)


def config(*flags: str) -> TrainConfig:
    return resolved(TrainConfig(**given(*flags)))


TUNE = ("--attack=apgd", "--finetune_model", "--model_name=net.pth")
IMAGENET = (*TUNE, "--dataset=imagenet")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"epochs": 80, "lr_schedule": "piecewise-70-10", "weight_decay": 5e-4, "batch_size": 128, "width": 64}),
        (["--attack=apgd"], {"l_norms": ("Linf", "L1"), "l_eps": (8 / 255, 12.0), "l_iters": (10, 10)}),
        (["--attack=apgd", "--multinorm=sat"], {"l_norms": ("Linf", "L2", "L1"), "l_eps": (8 / 255, 0.5, 12.0)}),
        (["--attack=apgd", "--at_iter=7", "--l_norms=L2"], {"l_iters": (7,), "eval_eps": (8 / 255, 0.5, 12.0)}),
        (["--attack=apgd", "--multinorm=ramp"], {"scheme_options": {"ramp_lambda": 2.0}}),
        (["--attack=apgd", "--loss=trades"], {"trades_beta": 6.0}),
        (["--attack=apgd", "--at_iter=7", "--l_iters=3 5"], {"l_iters": (3, 5)}),
        (["--dataset=digits"], {"width": 16, "act": "softplus1"}),
        (["--arch=wide-resnet-28-10"], {"width": None, "act": "relu"}),
        (TUNE, {"epochs": 3, "lr_schedule": "piecewise-ft", "save_freq": 1, "l_iters": (10, 10), "arch": None}),
        ((*TUNE, "--multinorm=ramp"), {"scheme_options": {"ramp_lambda": 0.5}}),
        (IMAGENET, {"epochs": 1, "weight_decay": 1e-4, "l_eps": (4 / 255, 255.0), "l_iters": (5, 15)}),
        ((*IMAGENET, "--multinorm=msd"), {"l_iters": (10, 10, 10)}),
        (["--attack=apgd", "--l_eps=4/255 6"], {"eval_eps": (4 / 255, 0.5, 6.0)}),
        (["--attack=apgd", "--eval_norms=L1 Linf"], {"eval_norms": ("L1", "Linf"), "eval_eps": (12.0, 8 / 255)}),
    ],
)
def test_flags_left_out_have_the_published_setting(flags: list[str], expected: dict[str, Any]) -> None:
    found = config(*flags)
    assert {name: getattr(found, name) for name in expected} == expected
    assert resolved(found) == found, "resolving twice changes nothing"


def test_a_configuration_cannot_be_changed() -> None:
    plain = TrainConfig()
    resolved(plain)
    assert plain == TrainConfig()
    with pytest.raises(FrozenInstanceError):
        plain.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", SCHEMES)
def test_config_json_rebuilds_it(name: str) -> None:
    asked = given(
        "--attack=apgd", f"--multinorm={name}", "--lr_max=1/3", "--l-iters=" + "4 " * len(SCHEMES[name].norms)
    )
    found = resolved(TrainConfig(**asked))
    content = json.loads(json.dumps(config_json(found, asked, {"network": {"arch": "x"}})))
    assert config_from_json(content, Path("run")) == found
    assert content["asked"] == json.loads(json.dumps(asked))
    assert type(scheme_of(found)) is SCHEMES[name]


def test_a_command_is_the_same_but_for_flags_that_leave_the_weights_alone() -> None:
    one = given("--attack=apgd", "--lr-max=0.1", "--l_norms=Linf L1")
    assert same_command(one, json.loads(json.dumps(one)))
    assert same_command(one, given("--l_norms=Linf L1", "--lr_max=1e-1", "--attack=apgd", "--resume", "--device=cpu"))
    assert same_command(
        one, given(*["--attack=apgd", "--lr-max=0.1", "--batch_size=128", "--seed=0"], "--l_norms=Linf L1")
    )
    for other in ("--seed=1", "--epochs=3", "--extra_data=more.npz", "--eval_norms=L1"):
        assert not same_command(one, given("--attack=apgd", "--lr-max=0.1", "--l_norms=Linf L1", other))


def test_only_what_leaves_the_weights_alone_may_change_in_a_resumed_run() -> None:
    saved = config("--attack=apgd", "--seed=3")
    again = resumed(saved, given("--resume=run", "--seed=3", "--final_eval", "--threads=1"), Path("run"))
    assert again == replace(saved, resume="run", final_eval=True, threads=1)
    with pytest.raises(ValueError, match="run was started with another seed, epochs: leave"):
        resumed(saved, given("--seed=4", "--epochs=9"), Path("run"))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "cifar10 from-scratch no-attack seed0"),
        (["--attack=apgd"], "cifar10 from-scratch apgd Linf-L1 seed0"),
        (["--attack=apgd", "--batch_size=128", "--epochs=80"], "cifar10 from-scratch apgd Linf-L1 seed0"),
        ([*TUNE, "--lr-schedule=piecewise-ft", "--l_norms=Linf L1"], "cifar10 from-net apgd Linf-L1 seed0"),
        (
            [
                "--attack=apgd",
                "--arch=wide-resnet-10-1",
                "--multinorm=max",
                "--loss=trades",
                "--l_eps=0.1 1 10",
                "--ema=0.9",
            ],
            "cifar10 from-scratch wide-resnet-10-1 apgd max Linf-L2-L1 trades l_eps-0.1-1-10 ema-0.9 seed0",
        ),
        (
            ["--attack=apgd", "--multinorm=ramp", "--ramp_lambda=3"],
            "cifar10 from-scratch apgd ramp Linf-L1 ramp_lambda-3 seed0",
        ),
        (["--l_norms=L2", "--l_eps=0.3", "--at_iter=3"], "cifar10 from-scratch no-attack seed0"),
        (["--seed=4", "--notes_run=x", "--device=cpu"], "cifar10 from-scratch no-attack seed4 x"),
    ],
)
def test_a_run_is_named_by_what_is_not_the_default(flags: list[str], name: str) -> None:
    asked = given(*flags)
    assert " ".join(run_name(resolved(TrainConfig(**asked)), asked)) == name


def test_flags_of_both_scripts_are_stated_once() -> None:
    shared = {"model_dir", "data_dir", "image_size", "l_eps", "batch_size_eval", "amp", "seed", "threads", "device"}
    for each in (TrainConfig, EvalConfig):
        assert not shared & set(each.__annotations__)
        assert shared <= set(each.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("epochs", "three", "whole number"),
        ("lr_max", "fast", "fraction"),
        ("batch_size", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("accumulate", 1.5, "whole number"),
        ("multinorm", "nope", "multinorm is 'nope'"),
        ("dataset", "mnist", "dataset is 'mnist'"),
        ("amp", "x", "amp is 'x'"),
        ("l_eps", ["x"], "fraction"),
        ("finetune_model", "yes", "finetune_model is 'yes'"),
        ("ramp_lambda", -3, "at least 0"),
    ],
)
def test_config_json_edited_by_hand_is_read_as_the_flags_are(name: str, value: Any, word: str) -> None:
    asked = given("--attack=apgd", "--multinorm=ramp")
    content = json.loads(json.dumps(config_json(resolved(TrainConfig(**asked)), asked, {})))
    with pytest.raises(ValueError, match=rf"run/config.json: .*{word}"):
        config_from_json(content | {name: value}, Path("run"))


def test_an_option_of_a_scheme_is_part_of_the_run() -> None:
    saved = config("--attack=apgd", "--multinorm=ramp", "--ramp_lambda=3")
    assert resumed(saved, given("--ramp_lambda=3"), Path("run")).scheme_options == {"ramp_lambda": 3.0}
    two = replace(saved, scheme_options={"ramp_lambda": 3.0, "other": 5.0})
    assert resumed(two, given("--ramp_lambda=3"), Path("run")).scheme_options == two.scheme_options
    with pytest.raises(ValueError, match="another ramp_lambda"):
        resumed(saved, given("--ramp_lambda=1"), Path("run"))
