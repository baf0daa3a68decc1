"""Optimizers, label smoothing, growing radii and AWP: what each computes, and that runs with them resume exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from attacks.apgd import apgd, apgd_each
from attacks.msd import msd
from attacks.multinorm import SCHEMES, make_scheme
from attacks.threat import Threat
from config import TrainConfig, resolved
from training.awp import AdversarialWeights
from training.optim import make_optimizer
from utils.checkpoint import load_tensors

FLAGS = ["--dataset=digits", "--device=cpu", "--threads=1", "--width=4", "--batch_size=32", "--attack=apgd"]
FLAGS += ["--at_iter=2", "--n_ex_train=160", "--epochs=2"]
NORMS = {"Linf": 0.1, "L2": 0.5, "L1": 3.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    "flags",
    [
        ["--awp=0.01", "--multinorm=ramp", "--lr-schedule=cosine", "--warmup=0.5"],
        ["--awp=0.01", "--gradient_projection"],
        ["--optimizer=adamw", "--label_smoothing=0.1", "--eps_warmup=0.8", "--lr-schedule=linear"],
        ["--nesterov", "--momentum=0.5", "--eps_warmup=0.8", "--multinorm=msd"],
    ],
)
def test_a_run_resumes_exactly(flags: list[str], cut_off: Callable[..., None]) -> None:
    whole = train.main([*FLAGS, *flags, "--save_dir=whole"])
    cut_off(6, *FLAGS, *flags, "--save_dir=cut", "--save_every=0.00001")
    [cut] = Path("cut").iterdir()
    train.main([f"--resume={cut}"])
    one, other = (load_tensors(folder / "ep_2.pth")["state_dict"] for folder in (whole, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    plain = load_tensors(train.main([*FLAGS, "--save_dir=plain"]) / "ep_2.pth")["state_dict"]
    assert not all(torch.equal(value, plain[name]) for name, value in one.items())


def test_the_optimizer_is_that_of_the_flags() -> None:
    model = network()
    sgd = make_optimizer(resolved(TrainConfig(momentum=0.5, nesterov=True)), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert [(group["momentum"], group["nesterov"], group["weight_decay"]) for group in sgd.param_groups] == [
        (0.5, True, 5e-4),
        (0.5, True, 0),
    ]
    adamw = make_optimizer(resolved(TrainConfig(optimizer="adamw", betas=(0.8, 0.9))), model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(group["betas"], group["weight_decay"]) for group in adamw.param_groups] == [
        ((0.8, 0.9), 0.05),
        ((0.8, 0.9), 0),
    ]


def test_a_rate_that_is_usual_for_the_optimizer() -> None:
    folder = train.main([*FLAGS, "--optimizer=adamw", "--epochs=1", "--lr-schedule=piecewise-1"])
    assert json.loads((folder / "config.json").read_text())["lr_max"] == 1e-3
    tuned = train.main(
        [*FLAGS[:3], *FLAGS[4:], "--optimizer=adamw", "--finetune_model", f"--model_name={folder}/ep_1.pth"]
    )
    assert json.loads((tuned / "config.json").read_text())["lr_max"] == 1e-4


@pytest.mark.parametrize("name", SCHEMES)
def test_label_smoothing_is_a_mixture_of_cross_entropies(name: str) -> None:
    """Of a share 1 - s of the label and s / K of each class, whatever the scheme adds."""
    threats = [Threat(norm, NORMS[norm]) for norm in SCHEMES[name].norms]
    scheme = make_scheme(name, threats, [2] * len(threats))
    versions = 1 if SCHEMES[name].single else len(threats)
    logits, y = torch.randn(versions, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    logits[1:] = logits[:1]  # the same versions: no maximum changes its place, and there is nothing to pair
    plain = scheme.loss(logits, y)
    scheme.label_smoothing = 0.3
    every = -logits[0].log_softmax(1).mean(1)
    assert torch.allclose(scheme.loss(logits, y), 0.7 * plain + 0.3 * every, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_scaled_radius_is_that_radius(norm: str) -> None:
    (x, y), model, scale = images(), network().eval(), torch.tensor(0.25)
    ours = apgd(model, x, y, Threat(norm, NORMS[norm]), 5, radius_scale=scale)
    theirs = apgd(model, x, y, Threat(norm, NORMS[norm] / 4), 5)
    assert torch.equal(ours.x_best, theirs.x_best)
    assert not torch.equal(ours.x_best, x)


def test_a_scaled_radius_in_several_norms() -> None:
    (x, y), model = images(), network().eval()
    threats, quarter = ([Threat(norm, eps * by) for norm, eps in NORMS.items()] for by in (1, 0.25))
    full, less = ([(threat, 4) for threat in each] for each in (threats, quarter))
    which, scale = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor(0.25)
    ours = apgd_each(model, x, y, which, full, radius_scale=scale)
    assert torch.equal(ours, apgd_each(model, x, y, which, less))
    theirs = msd(model, x, y, quarter, 4)
    for one, other in zip(msd(model, x, y, threats, 4, radius_scale=scale), theirs, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-6)


def test_radii_grow_over_the_first_share_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, radius_scale: Tensor, **more: int) -> object:
        seen.append(float(radius_scale))
        return apgd(model, x, y, threat, radius_scale=radius_scale, **more)

    monkeypatch.setattr("attacks.multinorm.apgd", spy)
    train.main([*FLAGS, "--eps_warmup=0.5", "--l_norms=L2"])  # 10 steps
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_awp_moves_weights_along_the_gradient_and_puts_them_back() -> None:
    x, y = images()
    model = network().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    awp = AdversarialWeights(model, 0.1)

    def gradient() -> None:
        nn.functional.cross_entropy(model(x.double()), y).backward()

    gradient()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.load_state_dict(before)
    with awp.perturbed(gradient):
        assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
        for name, value in model.state_dict().items():
            moved = value - before[name]
            if value.dim() > 1:
                expected = 0.1 * before[name].norm() * grads[name] / grads[name].norm()
                assert torch.allclose(moved, expected, atol=1e-12)
            else:
                assert not moved.any(), name  # biases, norm layers, their statistics and counters
        gradient()
        inside = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    after = {name: value for name, value in model.state_dict().items() if "running" not in name and "num" not in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    left = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(inside, left, strict=True))
    assert not torch.allclose(inside[0], grads["0.weight"])


def test_awp_survives_gradients_without_a_direction() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    for value in (0.0, float("inf"), float("nan")):

        def gradient(value: float = value) -> None:
            model.weight.grad = torch.full_like(model.weight, value)

        with AdversarialWeights(model, 0.1).perturbed(gradient):
            assert torch.equal(model.weight, before)
        assert torch.equal(model.weight, before)


def test_awp_costs_a_pass_more() -> None:
    passes = {}
    for flags in ([], ["--awp=0.01"]):
        folder = train.main([*FLAGS, "--l_norms=Linf", *flags])
        [line, _] = (folder / "metrics.jsonl").read_text().splitlines()
        passes[len(flags)] = json.loads(line)["passes"]
    assert passes == {0: {"forward": 4, "backward": 3}, 1: {"forward": 5, "backward": 4}}
