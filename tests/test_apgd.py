"""APGD: the known optimum of linear models, its costs and promises, and no operation that waits for data."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from attacks.apgd import APGD, EVALUATION_TOP_FRACTION, APGDState, AttackResult, apgd, loss_and_grad
from attacks.losses import cross_entropy, dlr, margin_targeted
from attacks.norms import NORMS, HalvingController, kth_by_bits, kth_by_sort, shrinking
from attacks.projections import project_l1
from attacks.threat import Threat
from data import DATASETS, load_dataset
from models.preact_resnet import PreActResNet18


def apgd_shrinking(  # how evaluation runs L1, here for every norm
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    n_iter: int = 100,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    delta_init: Tensor | None = None,
) -> AttackResult:
    return apgd(model, x, y, threat, 0, loss, delta_init, EVALUATION_TOP_FRACTION, shrinking(threat.eps, n_iter))


Attack = Callable[..., AttackResult]
ATTACKS = [(apgd, norm) for norm in NORMS] + [(apgd_shrinking, norm) for norm in NORMS]
RADII: dict[str, float] = {"Linf": 0.1, "L2": 0.7, "L1": 4.0}
SHAPE = (3, 8, 8)
ROWS = 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """logits = W x + b, with no room for an attack's mistakes."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        n = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.weight = nn.Parameter(torch.randn(classes, n, generator=generator(seed)))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator(seed + 1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)


def convolutions() -> nn.Module:
    """A small smooth network with fixed random weights, in eval mode; its weights don't touch the global generator."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    for i, p in enumerate(model.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=generator(i)) / max(p[0].numel(), 4) ** 0.5)
    return model.eval()


def points(rows: int = ROWS, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], about a third of the pixels at the border, and labels."""
    x = (torch.rand(rows, *SHAPE, generator=generator(7)) * 1.5 - 0.25).clamp(0, 1)
    return x, torch.arange(rows) % classes


def best_gain(slope: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """max <slope, delta> over ball and box in float64, (B,), by closed forms."""
    slope, x = slope.double().flatten(1), x.double().flatten(1)
    size, room = slope.abs(), torch.where(slope > 0, 1 - x, x)
    if threat.norm == "Linf":
        return (size * room.clamp(max=threat.eps)).sum(1)
    if threat.norm == "L1":
        # Fill the steepest entries to the border, the last of them in part.
        order = size.argsort(dim=1, descending=True)
        size, room = size.gather(1, order), room.gather(1, order)
        spent_before = room.cumsum(1) - room
        return (size * torch.minimum((threat.eps - spent_before).clamp(min=0), room)).sum(1)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(200):
        middle = (low + high) / 2
        inside = torch.minimum(middle * size, room).norm(dim=1, keepdim=True) <= threat.eps
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (size * torch.minimum(low * size, room)).sum(1)


def surface(x: Tensor, threat: Threat) -> Tensor:
    """Random starts (B, ...) on the ball's surface, as evaluation uses."""
    noise = torch.randn(x.shape, generator=generator(5))
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[threat.norm]
    return threat.eps * noise / noise.flatten(1).norm(p=order, dim=1).view(-1, 1, 1, 1)


def gap(attack: Attack, x: Tensor, y: Tensor, threat: Threat, delta_init: Tensor | None = None) -> float:
    """Fraction of the best possible gain of a linear margin that the attack misses, at worst over the examples."""
    model = Linear()
    target = (y + 1) % 4
    loss = partial(margin_targeted, target=target)
    slope = (model.weight[target] - model.weight[y]).detach().view(x.shape)
    result = attack(model, x, y, threat, 100, loss, delta_init)
    clean = loss(model(x).detach(), y).double()
    best = best_gain(slope, x, threat)
    reached = (slope.double() * (result.x_best.double() - x.double())).flatten(1).sum(1)
    torch.testing.assert_close(result.loss.double() - clean, reached, rtol=1e-3, atol=1e-3)
    assert bool((reached <= best * (1 + 1e-4)).all())
    return float(((best - reached) / best).max())


@pytest.mark.parametrize(
    ("attack", "norm", "start", "tolerance"),
    [
        (apgd, "Linf", "clean", 1e-5),
        (apgd, "Linf", "random", 1e-5),
        (apgd, "L2", "clean", 1e-5),
        (apgd, "L2", "random", 1e-5),
        # L1's direction is spent on the steepest entries, also where they touch the box: seen 0.237, 0.021, 0.020.
        (apgd, "L1", "clean", 0.25),
        (partial(apgd, top_fraction=EVALUATION_TOP_FRACTION), "L1", "clean", 0.025),
        (apgd, "L1", "random", 0.025),
        (apgd_shrinking, "L1", "clean", 0.025),  # seen 0.0193 and 0.0183
        (apgd_shrinking, "L1", "random", 0.025),
    ],
)
def test_reaches_the_best_margin_of_a_linear_model(attack: Attack, norm: str, start: str, tolerance: float) -> None:
    (x, y), threat = points(), Threat(norm, RADII[norm])
    noise = surface(x, threat) if start == "random" else None
    missed = gap(attack, x, y, threat, noise)
    assert missed <= tolerance


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2), ("L1", float("inf"))])
def test_without_the_box_the_gain_is_eps_times_the_dual_norm(norm: str, dual: float) -> None:
    _, y = points()
    x = torch.full((ROWS, *SHAPE), 0.5)
    threat = Threat(norm, 0.05)
    weight, target = Linear().weight.detach(), (y + 1) % 4
    slope = weight[target] - weight[y]
    torch.testing.assert_close(
        best_gain(slope, x, threat), threat.eps * slope.double().norm(p=dual, dim=1), rtol=1e-9, atol=0
    )
    missed = gap(apgd, x, y, threat)
    if norm == "L1":
        # 2 / 1.5 entries are rounded up to 2: the two steepest share the radius, and their mean is reached.
        top = slope.double().abs().topk(2, dim=1).values
        assert missed <= float((1 - top.mean(1) / top[:, 0]).max()) + 1e-4
    else:
        assert missed <= 1e-5


@pytest.mark.parametrize("loss", [cross_entropy, dlr, "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_two_classes_or_more_break_where_a_linear_model_can_be_broken(norm: str, loss: object) -> None:
    """An example breaks when the best gain is larger than its margin, and only then; those at the border left out."""
    x, y = points(32, 2)
    model = Linear(2)
    model.weight.data.mul_(0.05)
    threat = Threat(norm, RADII[norm])
    logits = model(x).detach().double()
    rows = torch.arange(len(y))
    margin = logits[rows, y] - logits[rows, 1 - y]
    slope = model.weight.detach()[1 - y] - model.weight.detach()[y]
    best = best_gain(slope, x, threat)
    chosen = partial(margin_targeted, target=1 - y) if loss == "margin" else loss
    if loss is dlr:  # needs three classes: one that is never the second
        model.weight.data = torch.cat([model.weight.data, torch.zeros(1, model.weight.shape[1])])
        model.bias.data = torch.cat([model.bias.data, torch.tensor([-100.0])])
    broken = apgd(model, x, y, threat, 100, chosen).broken  # type: ignore[arg-type]
    sure = (margin - best).abs() > 0.02 * best
    assert int(sure.sum()) > 20
    assert torch.equal(broken[sure], (margin <= best)[sure])
    assert int(broken.sum()) > 0


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
@pytest.mark.parametrize("start", ["clean", "random"])
@pytest.mark.parametrize("n_iter", [4, 15])
def test_promises_of_the_result(attack: Attack, norm: str, start: str, n_iter: int) -> None:
    model, (x, y) = convolutions(), points(classes=5)
    y = torch.where(torch.arange(ROWS) < 12, model(x).argmax(1), y)  # most are right at first
    threat = Threat(norm, RADII[norm] / 2)
    delta = 2 * RADII[norm] * torch.randn(x.shape, generator=generator(5)) if start == "random" else None
    result = attack(model, x, y, threat, n_iter, delta_init=delta)
    assert result.x_best.shape == result.x_adv.shape == x.shape
    assert result.broken.dtype == torch.bool
    assert bool(threat.contains(x, result.x_best).all())
    assert bool(threat.contains(x, result.x_adv).all())
    with torch.no_grad():
        assert torch.equal(model(result.x_adv).argmax(1) != y, result.broken)
        torch.testing.assert_close(cross_entropy(model(result.x_best), y), result.loss, rtol=1e-5, atol=1e-6)
        misclassified_best = model(result.x_best).argmax(1) != y
        wrong_at_first = model(x).argmax(1) != y
        if attack is apgd:
            first = x if delta is None else x + NORMS[norm].project(delta, x, torch.full((ROWS,), threat.eps))
            assert bool((result.loss >= cross_entropy(model(first), y) - 1e-6).all())
    assert bool(result.broken[misclassified_best].all())
    assert torch.equal(result.x_adv[~result.broken], x[~result.broken])
    if attack is apgd and start == "clean":
        assert bool(result.broken[wrong_at_first].all())
    for tensor in (result.x_best, result.x_adv, result.loss):
        assert not tensor.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_more_steps_find_more() -> None:
    model, (x, y) = convolutions(), points(classes=5)
    for norm in NORMS:
        few, many = (apgd(model, x, y, Threat(norm, RADII[norm]), n).loss.mean() for n in (2, 40))
        assert float(many) > float(few)


class Counter:
    """Counts the passes through a model, and those backward."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.forwards, self.backwards = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.model(x)
        if logits.requires_grad and x.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("n_iter", [1, 2, 10, 33])
@pytest.mark.parametrize("norm", NORMS)
def test_number_of_passes(norm: str, n_iter: int) -> None:
    counter, (x, y) = Counter(Linear()), points()
    apgd(counter, x, y, Threat(norm, RADII[norm]), n_iter)
    assert (counter.forwards, counter.backwards) == (n_iter + 1, n_iter)


@pytest.mark.parametrize(("n_iter", "stages"), [(100, (30, 30, 40)), (10, (3, 3, 4)), (4, (1, 1, 2)), (5, (1, 1, 3))])
def test_shrinking_has_three_stages(n_iter: int, stages: tuple[int, ...]) -> None:
    counter, (x, y) = Counter(Linear()), points()
    assert shrinking(4.0, n_iter) == list(zip((12.0, 8.0, 4.0), stages, strict=True))
    apgd_shrinking(counter, x, y, Threat("L1", 4.0), n_iter)
    # Three starts; the gradient at a stage's last point is not needed, but only the run's last is left out.
    assert (counter.forwards, counter.backwards) == (n_iter + 3, n_iter + 2)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_stages_are_runs_in_turn(norm: str) -> None:
    """A stage is a run of its own from the projection of the best point before; only the last one's points count."""
    model, (x, y) = convolutions().double(), points(classes=5)
    x = x.double()  # the rounding of x_best - x would grow
    delta = RADII[norm] * torch.randn(x.shape, generator=generator(5))
    stages = [(2 * RADII[norm], 6), (RADII[norm], 11)]
    together = apgd(model, x, y, Threat(norm, RADII[norm]), delta_init=delta, top_fraction=0.2, stages=stages)
    first = apgd(model, x, y, Threat(norm, stages[0][0]), 6, delta_init=delta, top_fraction=0.2)
    second = apgd(model, x, y, Threat(norm, stages[1][0]), 11, delta_init=first.x_best - x, top_fraction=0.2)
    for name in ("x_best", "x_adv", "loss"):
        torch.testing.assert_close(getattr(together, name), getattr(second, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(together.broken, second.broken)


def test_a_stage_of_l1_starts_at_the_projection_of_the_best_point_and_keeps_its_sparsity() -> None:
    model, (x, y) = convolutions().double(), points(classes=5)
    x, radius = x.double(), torch.full((len(x),), RADII["L1"], dtype=torch.float64)
    delta = RADII["L1"] * torch.randn(x.shape, generator=generator(5))
    first = apgd(model, x, y, Threat("L1", 2 * RADII["L1"]), 6, delta_init=delta, top_fraction=0.2)
    run = APGD("L1", [(2 * RADII["L1"], 6), (RADII["L1"], 11)], 0.2, x)
    rows = run.begin(x, delta)
    for _ in range(8):
        judged = rows.delta
        run.receive(rows, *loss_and_grad(model, x + judged, y, cross_entropy, True)[:2])
        run.move(rows)
    torch.testing.assert_close(judged, project_l1(first.x_best - x, x, radius), rtol=0, atol=1e-9)
    torch.testing.assert_close(rows.keep, (judged != 0).flatten(1).sum(1) / 1.5, check_dtype=False)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_out_of_step_go_the_same_way(norm: str) -> None:
    """APGDState that join late and leave early, as in evaluation, see the points that they would see alone."""
    model, (x, y) = convolutions(), points(classes=5)
    run = APGD(norm, [(2 * RADII[norm], 4), (RADII[norm], 9)], 0.2, x)
    seen: list[list[Tensor]] = [[] for _ in range(ROWS)]

    def turn(rows: APGDState, who: Tensor) -> None:
        for i, image in zip(who.tolist(), rows.x + rows.delta, strict=True):
            seen[i].append(image)
        run.receive(rows, *loss_and_grad(model, rows.x + rows.delta, y[who], cross_entropy, with_grad=True)[:2])

    who = torch.arange(ROWS // 2)
    rows = run.begin(x[who])
    for tick in range(2 * run.ticks):
        turn(rows, who)
        going = rows.tick < run.ticks
        rows, who = rows.pick(going), who[going]
        if not len(who) and tick > 5:
            break
        run.move(rows)
        if tick == 5:
            late = torch.arange(ROWS // 2, ROWS)
            rows, who = rows.join(run.begin(x[late])), torch.cat([who, late])
    for half in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
        rows = run.begin(x[half])
        for tick in range(run.ticks):
            expected = torch.stack([seen[i][tick] for i in range(ROWS)[half]])
            torch.testing.assert_close(rows.x + rows.delta, expected, rtol=1e-4, atol=1e-5)
            run.receive(rows, *loss_and_grad(model, rows.x + rows.delta, y[half], cross_entropy, with_grad=True)[:2])
            if tick + 1 < run.ticks:
                run.move(rows)
    assert {len(images) for images in seen} == {run.ticks}


@pytest.mark.parametrize("n_iter", [0, -1])
@pytest.mark.parametrize("attack", [apgd, apgd_shrinking])
def test_no_steps_is_an_error(attack: Attack, n_iter: int) -> None:
    x, y = points()
    with pytest.raises(ValueError, match="at least one step"):
        attack(Linear(), x, y, Threat("L1", 4.0), n_iter)


def test_too_few_steps_for_three_stages_is_an_error() -> None:
    x, y = points()
    with pytest.raises(ValueError, match="at least one step"):
        apgd_shrinking(Linear(), x, y, Threat("L1", 4.0), 3)


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_result_does_not_depend_on_the_batch(attack: Attack, norm: str) -> None:
    model, (x, y) = convolutions(), points(classes=5)
    threat = Threat(norm, RADII[norm])
    delta = threat.eps * torch.randn(x.shape, generator=generator(5))
    whole = attack(model, x, y, threat, 10, delta_init=delta)
    half = ROWS // 2
    halves = [attack(model, x[s], y[s], threat, 10, delta_init=delta[s]) for s in (slice(half), slice(half, None))]
    for name in ("x_best", "x_adv", "loss"):
        joined = torch.cat([getattr(part, name) for part in halves])
        torch.testing.assert_close(getattr(whole, name), joined, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.broken, torch.cat([part.broken for part in halves]))


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_channels_last_network(attack: Attack, norm: str) -> None:
    x, y = points(classes=5)
    threat = Threat(norm, RADII[norm])
    plain = attack(convolutions(), x, y, threat, 6)
    model = convolutions().to(memory_format=torch.channels_last)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        result = attack(model, images, y, threat, 6)
        torch.testing.assert_close(result.loss, plain.loss, rtol=1e-3, atol=1e-3)
        assert bool(threat.contains(x, result.x_best).all())


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_runs_on_meta_so_it_never_waits_for_data(attack: Attack, norm: str) -> None:
    with torch.device("meta"):
        model = PreActResNet18(width=8).eval()
        x, y = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
        delta = torch.rand(4, 3, 32, 32)
    for start in (None, delta) if attack is apgd else (delta,):
        result = attack(model, x, y, Threat(norm, RADII[norm]), 2 if attack is apgd else 4, delta_init=start)
        assert result.x_best.device.type == "meta"
        assert result.x_adv.shape == x.shape
        assert result.broken.shape == result.loss.shape == (4,)


@pytest.mark.parametrize(
    ("n_iter", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),  # intervals 22, 19, 16, ... 7, then 6
        (10, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1, [1]),
    ],
)
def test_check_points(n_iter: int, expected: list[int]) -> None:
    intervals = HalvingController.check_points(n_iter)
    assert [k + 1 for k, interval in enumerate(intervals) if interval] == expected
    assert torch.tensor(intervals).cumsum(0)[torch.tensor(expected) - 1].tolist() == expected


@pytest.mark.parametrize(("rises", "halved"), [(16, True), (17, False), (22, False), (0, True)])
def test_step_is_halved_at_no_more_than_three_quarters_rises(rises: int, halved: bool) -> None:
    """The first check-point of 100 steps comes after 22, 75 % of which are 16.5."""
    run = APGD("Linf", [(0.1, 100)], 0.05, torch.zeros(1))
    rows = run.begin(torch.full((1, 4), 0.5))
    value = torch.zeros(1)
    run.receive(rows, value, torch.ones(1, 4))
    for k in range(22):
        run.move(rows)
        value = value + 1 if k < rises else value - 0.01
        run.receive(rows, value, torch.ones(1, 4))
    assert (rows.value_at_check.tolist() == [-math.inf]) is halved  # as the next check-point is told
    assert rows.step.tolist() == pytest.approx([0.1 if halved else 0.2])


@pytest.mark.parametrize("scale", [1e-25, 1e-35])
@pytest.mark.parametrize("norm", NORMS)
def test_tiny_gradients_still_move(norm: str, scale: float) -> None:
    """A saturated network's gradient: its squares underflow in float32."""
    x, y = torch.full((ROWS, *SHAPE), 0.5), points()[1]
    target = (y + 1) % 4
    model = Linear()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return scale * margin_targeted(logits, labels, target)

    threat = Threat(norm, 0.05)
    result = apgd(model, x, y, threat, 100, loss)
    slope = (model.weight[target] - model.weight[y]).detach()
    reached = (slope * (result.x_best - x).flatten(1)).sum(1).double()
    # L1 stops at two entries: see the test without the box.
    assert bool((reached >= (0.9 if norm == "L1" else 0.999) * best_gain(slope, x, threat)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_is_harmless(norm: str) -> None:
    x, y = points()

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4] * 0

    result = apgd(flat, x, y, Threat(norm, RADII[norm]), 10)
    assert bool(result.x_best.isfinite().all())
    assert bool(Threat(norm, RADII[norm]).contains(x, result.x_best).all())


@pytest.mark.parametrize("norm", NORMS)
def test_images_that_ask_for_a_gradient_get_none(norm: str) -> None:
    x, y = points(classes=5)
    result = apgd(convolutions(), x.requires_grad_(True), y, Threat(norm, RADII[norm]), 2)
    assert not result.x_best.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_is_that_of_a_sort(dtype: torch.dtype) -> None:
    draws = generator(0)
    size = (
        torch.randn(40, 33, generator=draws, dtype=dtype).abs()
        * 10 ** torch.linspace(-40, 30, 40, dtype=dtype)[:, None]
    )
    size[1::3] = size[1::3].round(decimals=0)  # ties, and rows of zeros
    k = torch.randint(1, 34, (40, 1), generator=draws)
    expected = size.sort(dim=1, descending=True).values.gather(1, k - 1)
    for find in (kth_by_bits, kth_by_sort):
        assert torch.equal(find(size, k.to(dtype)), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_radius_has_the_precision_of_the_images(norm: str) -> None:
    """In whatever order the types come. 0.1 in float32 is above 0.1."""
    eps, (x, y) = 0.1, points()
    for dtype, expected in ((torch.float32, torch.tensor(eps).item()), (torch.float64, eps)):
        black, model = torch.zeros_like(x, dtype=dtype), Linear().to(dtype)
        assert APGD(norm, [(eps, 3)], 0.05, black).tables.eps.tolist() == [expected] * 4
        reached = NORMS[norm].size(apgd(model, black, y, Threat(norm, eps), 3).x_best.double())
        assert bool((reached <= expected * (1 + (1e-14 if dtype == torch.float64 else 1e-6))).all())
        assert float(reached.max()) > 0.99 * eps
    assert APGD(norm, [(eps, 3)], 0.05, x.half()).tables.eps.dtype == torch.float32


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_from_the_same_start_it_finds_what_pyautoattack_finds(norm: str, trained: nn.Module) -> None:
    """Per point in Linf; in L2, where that one clips instead of projecting, at least as much in the mean."""
    x, y = load_dataset("digits", "").test.take(64).pixels()
    threat = Threat(norm, DATASETS["digits"].radii[norm])
    theirs = APGDAttack(trained, n_iter=20, norm=norm, eps=threat.eps, seed=0, loss="ce", device="cpu")
    theirs.init_hyperparam(x)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        found = F.cross_entropy(trained(theirs.attack_single_run(x, y)[0]), y, reduction="none")
        torch.manual_seed(seed)
        start = 2 * torch.rand_like(x) - 1 if norm == "Linf" else torch.randn_like(x)
        length = torch.linalg.vector_norm(start.flatten(1), float("inf") if norm == "Linf" else 2, dim=1)
        start = threat.eps * start / length.view(-1, 1, 1, 1)
        losses.append((apgd(trained, x, y, threat, 20, delta_init=start).loss, found))
    ours, others = (torch.stack(side) for side in zip(*losses, strict=True))
    assert float(ours.mean()) >= float(others.mean()) - 1e-3
    if norm == "Linf":
        assert float(((ours - others).abs() < 1e-3).float().mean()) > 0.95
