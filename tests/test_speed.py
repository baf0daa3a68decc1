"""Number formats, layouts and compiled networks give what the plain ones give, and an update never waits for the device."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import train
from attacks.apgd import apgd, loss_and_grad
from attacks.losses import cross_entropy
from attacks.multinorm import SCHEMES, AdversarialBatch, Scheme, make_scheme
from attacks.norms import NORMS
from attacks.threat import Threat
from data import DATASETS, BatchLoader, Split, load_dataset
from models import build_model, layers, preact_resnet
from training.optim import EMA
from utils.modules import EVENTS, AsyncScalars, eval_mode, no_param_grad
from utils.precision import autocast_model, check_amp, compiled_network, set_up_torch, with_cast_weights

CPU = torch.device("cpu")


def wide(width: int = 16) -> nn.Module:
    """A network whose BatchNorms have statistics of their own."""
    torch.manual_seed(0)
    model = build_model("preact-resnet18", in_channels=3, width=width)
    for _ in range(3):
        model(torch.rand(16, 3, 12, 12))
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same weights laid out plainly."""
    other = build_model("preact-resnet18", in_channels=3, width=model.conv1.out_channels)
    other.layout = torch.contiguous_format  # type: ignore[assignment]
    other.to(memory_format=torch.contiguous_format).load_state_dict(model.state_dict())
    return other.train(model.training)


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_and_folded_statistics_change_nothing(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide().train(training)
    other = plain(model)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))

    def gradients(network: nn.Module) -> list[Tensor]:
        images = x.clone().requires_grad_(True)
        loss = network(images).logsumexp(1).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [images, *network.parameters()])]

    ours = [gradients(model) for _ in range(3)]  # three times: memory that is corrupted differs from call to call
    for module in (layers, preact_resnet):
        monkeypatch.setattr(module, "normalise", lambda bn, value: bn(value))
    expected = gradients(other)
    for found in ours:
        assert found[1].is_contiguous()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("width", [4, 8, 24])
def test_narrow_networks_stay_plain(width: int) -> None:
    weight = build_model("preact-resnet18", width=width).layer1[0].conv1.weight
    assert weight.is_contiguous()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_passes_find_nearly_the_same_loss(amp: str, norm: str, trained: nn.Module) -> None:
    x, y = load_dataset("digits", "").test.take(64).pixels()
    threat = Threat(norm, DATASETS["digits"].radii[norm])
    whole = apgd(trained, x, y, threat, 10)
    half = apgd(autocast_model(trained, CPU, amp), x, y, threat, 10)  # type: ignore[arg-type]
    assert half.x_best.dtype == half.loss.dtype == torch.float32
    assert bool(threat.contains(x, half.x_best).all())
    reached = F.cross_entropy(trained(half.x_best), y)
    assert float(reached) == pytest.approx(float(whole.loss.mean()), rel=0.02)


def test_small_gradients_survive_float16() -> None:
    # The gradient of a sure answer's cross-entropy, 2e-8 here, is no float16.
    weight = torch.tensor([[0.5, -0.5], [-0.25, 0.25]])
    model = autocast_model(nn.Linear(2, 2, bias=False), CPU, "fp16")

    def network(x: Tensor) -> Tensor:
        return x.half() @ weight.half() + torch.tensor([17.0, 0.0], dtype=torch.float16)

    assert model(torch.rand(1, 2)).dtype == torch.float16
    _, grad, _ = loss_and_grad(network, torch.full((1, 2), 0.5), torch.tensor([0]), cross_entropy, True)
    assert grad.sign().tolist() == [[-1.0, 1.0]]


def test_fp16_is_for_cuda() -> None:
    check_amp(CPU, "bf16")
    with pytest.raises(ValueError, match="take bf16"):
        check_amp(CPU, "fp16")


def test_set_up_sets_threads_and_what_suits_training() -> None:
    before = torch.get_num_threads()
    try:
        set_up_torch(1, tf32=True)
        assert torch.get_num_threads() == 1
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
    finally:
        set_up_torch(before, tf32=False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)


@pytest.mark.parametrize("norm", [None, *NORMS])
def test_attack_and_training_step_run_on_meta(norm: str | None) -> None:
    """Nothing there has a value: whatever waited for one would fail."""
    meta = torch.device("meta")
    with meta:
        model = build_model("preact-resnet18", in_channels=3, width=16).train()
        x, y = torch.rand(8, 3, 12, 12), torch.zeros(8, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if norm:
        with no_param_grad(model):
            x = apgd(model.eval(), x, y, Threat(norm, 0.5), 3).x_best
        model.train()
    parts = zip(x.split(4), y.split(4), strict=True)
    micro_batches = [(AdversarialBatch.clean(part, 0), labels) for part, labels in parts]
    sums = train.forward_backward(model, Scheme([]), micro_batches, 1 / 8, scaler)
    train.optimizer_step(optimizer, scaler, grad_clip=1)
    assert (sums.device, sums.shape) == (meta, (4,))


def test_a_step_in_fp16_scales_its_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = load_dataset("digits", "").train.take(32).pixels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=5, enabled=True)
    batch = [(AdversarialBatch.clean(x, 0), y)]
    half = autocast_model(model, CPU, "fp16")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(float(train.forward_backward(half, Scheme([]), batch, 1 / 32, scaler)[0]))
        train.optimizer_step(optimizer, scaler, None)
    assert losses[-1] < losses[0] / 2
    assert scaler.get_scale() == 1024 * 2**6  # doubled after each five updates


def test_an_asynchronous_copy_is_not_changed_by_what_comes_after() -> None:
    value = torch.tensor(3)
    coming = AsyncScalars(value)
    value += 1
    assert coming.numbers() == 3


def test_softplus_in_bf16() -> None:
    x = torch.linspace(-30, 30, 10_001).bfloat16().requires_grad_(True)
    value = layers.softplus(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    exact = F.softplus(x.detach().double(), threshold=100)
    assert float(((value.detach().double() - exact).abs() / (1 + exact)).max()) < 0.01
    torch.testing.assert_close(slope.double(), torch.sigmoid(x.detach().double()), rtol=0.01, atol=0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    """Of more than 32 MB, which glibc as it comes gives back; the heap grows a few times until one fits between others."""
    script = (
        "import resource, torch; from utils.precision import keep_freed_memory; keep_freed_memory()\n"
        "for _ in range(24): torch.zeros(9, 2**20).add_(1); print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
    faults = [int(line) for line in told.split()]
    assert faults[23] - faults[11] < 12 * 9 * 2**20 // 1024 // 4  # pages of 1,024 numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", SCHEMES)
def test_training_never_waits_for_the_gpu(name: str) -> None:
    device = torch.device("cuda")
    model = build_model("preact-resnet18", width=16).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler, scheme = (
        torch.amp.GradScaler(enabled=False),
        make_scheme(name, [Threat("Linf", 0.1), Threat("L1", 12)], [3, 3]),
    )
    outcomes: deque[AsyncScalars] = deque()
    split = Split(
        torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device=device),
        torch.zeros(64, dtype=torch.int64, device=device),
        255,
        4,
        True,
    )
    for epoch in range(2):  # the first one fills caches
        parts = BatchLoader(split, 16, 0, device).epoch(epoch)
        x, y = next(parts)
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")
        for step, (x, y) in enumerate(parts):
            sampled = scheme.draw(len(x), step, torch.Generator().manual_seed(step))
            with eval_mode(model), no_param_grad(model):
                adversarial = scheme.attack(model, x, y, sampled)
            optimizer.zero_grad()
            sums = train.forward_backward(model, scheme, [(adversarial, y)], 1 / len(x), scaler)
            train.optimizer_step(optimizer, scaler, None)
            outcomes.append(AsyncScalars(sums))
            if len(outcomes) > 1:
                outcomes.popleft().numbers()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_a_compiled_network_trains_alike(tmp_path: Path) -> None:
    flags = [
        f"--save_dir={tmp_path}",
        "--dataset=digits",
        "--width=16",
        "--n_ex_train=128",
        "--epochs=1",
        "--attack=apgd",
        "--at_iter=2",
    ]
    folders = [train.main([*flags, f"--notes_run={word}", *more]) for word, more in (("a", []), ("b", ["--compile"]))]
    one, other = (torch.load(folder / "ep_1.pth", weights_only=True)["state_dict"] for folder in folders)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-3)


def test_a_compiled_network_keeps_the_graph_of_full_batches() -> None:
    """A partial batch has a graph of its own, and full ones use theirs again: with one for any size they would lose theirs."""
    torch._dynamo.reset()
    model = build_model("preact-resnet18", in_channels=1, width=4).eval()
    network = compiled_network(model, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    found = []
    for size in (8, 8, 3, 8, 3, 8, 5, 8):
        before = graphs["unique_graphs"]
        x = torch.rand(size, 1, 8, 8).requires_grad_()
        torch.testing.assert_close(network(x.clone()), model(x), rtol=1e-4, atol=1e-4)
        found.append(graphs["unique_graphs"] > before)
    assert found == [True, False, True, False, False, False, True, False]
    assert torch._dynamo.config.recompile_limit >= 64
    torch._dynamo.reset()


def test_the_average_is_torchs() -> None:
    """EMA against torch.optim.swa_utils, also of what is not floating: there it is the model's own."""
    torch.manual_seed(0)
    model = build_model("preact-resnet18", in_channels=1, width=4).train()
    ours = EMA(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(4):
        with torch.no_grad():
            model(torch.rand(8, 1, 8, 8))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ours.update(model)
        theirs.update_parameters(model)
        for name, value in theirs.module.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(ours.module.state_dict()[name], value), (step, name)
            else:
                assert torch.equal(ours.module.state_dict()[name], model.state_dict()[name])
    again = EMA(model, 0.9)
    again.load_state_dict(ours.state_dict())
    again.update(model)
    ours.update(model)
    pairs = zip(again.module.state_dict().values(), ours.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_scalars_of_a_device_with_events_are_waited_for_once_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands in for CUDA and MPS: the copy does not block, and the event is asked when the numbers are read."""
    told: list[str] = []

    class Event:
        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("wait")

    copy_ = Tensor.copy_

    def noting(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        told.append("non-blocking" if non_blocking else "blocking")
        return copy_(self, source)

    monkeypatch.setattr(Tensor, "copy_", noting)
    scalars = AsyncScalars(torch.tensor([1.0, 2.0]))
    assert told == ["blocking"]
    assert scalars.numbers() == [1.0, 2.0]
    told.clear()
    monkeypatch.setitem(EVENTS, "cpu", Event)
    scalars = AsyncScalars(torch.tensor([1.0, 2.0]))
    assert told == ["non-blocking", "record"]
    assert scalars.numbers() == [1.0, 2.0]
    assert told == ["non-blocking", "record", "wait"]


def test_weights_cast_once_give_what_autocast_gives() -> None:
    model, x = wide().eval(), torch.rand(4, 3, 16, 16)
    cast = with_cast_weights(model, "bf16")
    for network in (model, cast):
        assert network.conv1.weight.dtype == (torch.float32 if network is model else torch.bfloat16)
        assert network.bn.weight.dtype == torch.float32
    with torch.no_grad():
        one, other = (autocast_model(network, CPU, "bf16")(x) for network in (model, cast))
    assert torch.equal(one, other)
