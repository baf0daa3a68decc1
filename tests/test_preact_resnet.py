"""PreAct ResNet-18: the published names, any image size, and the published functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.preact_resnet import ACTIVATIONS, PreActResNet18


def small(**kwargs: object) -> PreActResNet18:
    """A narrow network in eval mode with fixed random weights and BatchNorm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PreActResNet18(width=8, **kwargs)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_state_dict_has_the_published_names() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn.{name}" for name in norm)}
    for layer in range(1, 5):
        for block in range(2):
            prefix = f"layer{layer}.{block}"
            names |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight"}
            names |= {f"{prefix}.{bn}.{name}" for bn in ("bn1", "bn2") for name in norm}
    names |= {f"layer{layer}.0.shortcut.0.weight" for layer in (2, 3, 4)}
    assert set(PreActResNet18(width=8).state_dict()) == names


def test_number_of_parameters() -> None:
    widths = [64, 128, 256, 512]
    expected = 9 * 3 * 64 + 2 * 512 + 512 * 10 + 10  # first convolution, last norm, linear
    before = 64
    for width in widths:
        expected += 9 * before * width + 3 * 9 * width * width + 2 * before + 3 * 2 * width
        expected += before * width if before != width else 0
        before = width
    assert sum(p.numel() for p in PreActResNet18().parameters()) == expected == 11_172_170


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 48)])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_logits_for_any_image_size(shape: tuple[int, int, int], num_classes: int) -> None:
    logits = small(in_channels=shape[0], num_classes=num_classes)(torch.rand(2, *shape))
    assert logits.shape == (2, num_classes)
    assert bool(logits.isfinite().all())


def test_forward_as_published_at_32() -> None:
    model = small()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = model.conv1(x)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            inside = F.softplus(block.bn1(out))
            skip = block.shortcut(inside) if hasattr(block, "shortcut") else out
            out = skip + block.conv2(F.softplus(block.bn2(block.conv1(inside))))
    pooled = F.avg_pool2d(F.relu(model.bn(out)), 4)
    assert pooled.shape == (3, 64, 1, 1)
    torch.testing.assert_close(model(x), model.linear(pooled.flatten(1)), rtol=1e-4, atol=1e-5)


def test_softplus_is_exact() -> None:
    x = torch.cat([torch.linspace(-30, 30, 10_001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 1e-8, 100.0, 1e4])])
    x.requires_grad_(True)
    value = ACTIVATIONS["softplus1"](x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    exact = x.detach().double()
    torch.testing.assert_close(value.double(), torch.logaddexp(exact, torch.zeros_like(exact)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), torch.sigmoid(exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_runs_forward_and_backward(act: str) -> None:
    model = small(act=act, in_channels=1)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert bool(grad.isfinite().all())
    assert float(grad.abs().sum()) > 0
