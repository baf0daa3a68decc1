"""Wide residual networks: RobustBench's names and logits, published files of every usual form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import build_model, robustbench_zoo
from models.from_file import NetworkFlags
from models.preact_resnet import ACTIVATIONS
from models.pretrained import load_model

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def independent(**kwargs: object) -> nn.Module:
    """RobustBench's network, with random weights and statistics."""
    with robustbench_zoo._importable():
        from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    torch.manual_seed(0)
    model: nn.Module = WideResNet(**kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.is_meta:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def logits_and_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = IMAGES.clone().requires_grad_(True)
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_same_weights_same_logits_as_robustbench(depth: int, widen: int, training: bool) -> None:
    theirs = independent(depth=depth, widen_factor=widen)
    ours = build_model(f"wide-resnet-{depth}-{widen}")
    ours.load_state_dict(theirs.state_dict())
    (logits, gradient), (expected, slope) = (logits_and_gradient(model.train(training)) for model in (ours, theirs))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max()))
    for name, value in theirs.state_dict().items():  # the running statistics
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "widen", "parameters"), [(28, 10, 36_479_194), (34, 10, 46_160_474), (40, 2, 2_243_546)]
)
def test_names_and_shapes_of_robustbench(depth: int, widen: int, parameters: int) -> None:
    with torch.device("meta"):
        ours = build_model(f"wide-resnet-{depth}-{widen}")
        theirs = independent(depth=depth, widen_factor=widen)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.3.bn2.running_var", "fc.bias"} < expected.keys()
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 48, 64)])
def test_any_image_size_and_activation(shape: tuple[int, int, int], act: str) -> None:
    torch.manual_seed(0)
    model = build_model("wide-resnet-10-1", num_classes=7, in_channels=shape[0], act=act).eval()
    x = torch.rand(2, *shape).requires_grad_(True)
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    assert logits.shape == (2, 7)
    assert grad.is_contiguous()
    assert bool(grad.isfinite().all())
    assert float(grad.abs().sum()) > 0


@pytest.mark.parametrize("in_channels", [1, 3])
def test_channels_last_gives_the_same_gradients_again_and_again(in_channels: int) -> None:
    torch.manual_seed(0)
    model = build_model("wide-resnet-10-1", in_channels=in_channels, act="softplus1")
    exact = build_model("wide-resnet-10-1", in_channels=in_channels, act="softplus1").double()
    exact.load_state_dict(model.state_dict())
    assert model.block1.layer[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(8, in_channels, 12, 12, generator=torch.Generator().manual_seed(1))

    def gradients(network: nn.Module, images: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(network(images).logsumexp(1).sum(), list(network.parameters())))

    expected = gradients(exact, x.double())
    for _ in range(3):  # memory that is corrupted differs from call to call
        for a, b in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize(
    "name",
    ["wide-resnet-27-10", "wide-resnet-4-10", "wide-resnet-28", "wide-resnet-28-0", "wide-resnet-28-10-2", "WRN-28-10"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 4|wide-resnet-28-10"):
        build_model(name)


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        without_counts,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "num_classes": 100},
    ],
)
@pytest.mark.parametrize("sub_block1", [False, True])
def test_published_files_tell_their_network(
    wrap: Callable[[dict[str, Tensor]], object], sub_block1: bool, tmp_path: Path
) -> None:
    theirs = independent(depth=16, widen_factor=2, num_classes=100, sub_block1=sub_block1)
    torch.save(wrap(theirs.state_dict()), tmp_path / "net.pt")
    for arch in (None, "wide-resnet-16-2"):
        loaded = load_model("net.pt", str(tmp_path), "cifar100", NetworkFlags(arch=arch))
        assert loaded.spec == {"arch": "wide-resnet-16-2", "num_classes": 100, "in_channels": 3, "act": "relu"}
        with torch.no_grad():
            torch.testing.assert_close(loaded.model.eval()(IMAGES), theirs(IMAGES), rtol=1e-5, atol=1e-5)
    assert load_model("net.pt", str(tmp_path), "cifar100", NetworkFlags(act="silu")).spec["act"] == "silu"
    with pytest.raises(ValueError, match=r"net\.pt: its network is wide-resnet-16-2; leave --arch=preact-resnet18 out"):
        load_model("net.pt", str(tmp_path), "cifar100", NetworkFlags(arch="preact-resnet18"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"mu": torch.zeros(1, 3, 1, 1)}, "the first mu"),
        (
            lambda state: {name: t for name, t in state.items() if not name.startswith("block3.layer.1")},
            "block3.layer.1",
        ),
        (lambda state: {name.replace("block1", "layer.0"): tensor for name, tensor in state.items()}, "RB_{id}"),
    ],
)
def test_files_of_variants_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    torch.save(change(build_model("wide-resnet-16-1").state_dict()), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        load_model("net.pt", str(tmp_path), "cifar10")
