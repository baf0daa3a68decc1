"""Schemes: what each draws, which points it makes and what its loss is, against hand calculations; E-AT's running errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks.apgd import apgd
from attacks.msd import msd
from attacks.multinorm import EAT, SCHEMES, RunningErrors, Scheme, make_scheme, register
from attacks.threat import NORMS, Threat
from training.metrics import per_threat_sums

LINF, L2, L1 = Threat("Linf", 0.1), Threat("L2", 0.5), Threat("L1", 3.0)
THREATS = [LINF, L2, L1]


Counts = tuple[list[int], list[int]]


def counts(*rows: tuple[int, int]) -> Counts:
    """Correct predictions and examples, of (correct, seen) for each threat."""
    return [correct for correct, _ in rows], [seen for _, seen in rows]


def met(index: int, right: int, seen: int, number: int) -> Counts:
    """A step that met one threat alone."""
    return counts(*((right, seen) if i == index else (0, 0) for i in range(number)))


def test_even_until_each_threat_was_met() -> None:
    errors = RunningErrors(3)
    assert errors.probabilities() == pytest.approx([1 / 3] * 3)
    errors.observe(*met(0, 1, 10, 3))
    errors.observe(*met(2, 9, 10, 3))
    assert errors.rates() == pytest.approx([0.9, 1, 0.1])
    assert errors.probabilities() == pytest.approx([1 / 3] * 3)
    errors.observe(*counts((0, 0), (5, 10), (0, 0)))
    assert errors.probabilities() == pytest.approx([0.9 / 1.5, 0.5 / 1.5, 0.1 / 1.5])


@settings(deadline=None, database=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=30),
)
def test_chances_follow_the_counts_of_the_whole_run(updates: list[tuple[int, int, float]]) -> None:
    errors = RunningErrors(2)
    right, seen = [0, 0], [0, 0]
    for index, size, share in updates:
        errors.observe(*met(index, int(share * size), size, 2))
        right[index] += int(share * size)
        seen[index] += size
    told = errors.rates()
    assert (errors.correct, errors.seen) == (right, seen)
    assert sum(errors.probabilities()) == pytest.approx(1)
    if all(seen):
        expected = [1 - r / s for r, s in zip(right, seen, strict=True)]
        assert told == pytest.approx(expected)
        chances = [error / sum(expected) for error in expected] if sum(expected) else [0.5, 0.5]
        assert errors.probabilities() == pytest.approx(chances)
    else:
        assert errors.probabilities() == pytest.approx([0.5, 0.5])


def after(name: str, *rows: tuple[int, int]) -> EAT:
    """A scheme that has met its threats so."""
    scheme = make_scheme(name, THREATS[: len(rows)], [1] * len(rows))
    assert isinstance(scheme, EAT)
    scheme.observe(*counts(*rows))
    return scheme


@pytest.mark.parametrize("name", ["eat", "eat-mixed", "eat-uniform", "sat"])
@pytest.mark.parametrize("rights", [(20, 80, 50), (50, 50), (100, 60), (0, 99)])
def test_draws_have_their_frequencies(name: str, rights: tuple[int, ...]) -> None:
    """In proportion to the errors, or even; the same for a batch, or apart for each image."""
    scheme = after(name, *((right, 100) for right in rights))
    generator = torch.Generator().manual_seed(0)
    n = 10_000
    if name == "eat-mixed":
        drawn = scheme.draw(n, 0, generator)
    else:
        batches = [scheme.draw(5, 0, generator) for _ in range(n)]
        assert all(len(set(batch.tolist())) == 1 and len(batch) == 5 for batch in batches)
        drawn = torch.stack(batches)[:, 0]
    for index, right in enumerate(rights):
        chance = (100 - right) / sum(100 - each for each in rights) if name.startswith("eat") else 1 / len(rights)
        chance = 1 / len(rights) if name == "eat-uniform" else chance
        error = (chance * (1 - chance) / n) ** 0.5
        assert abs(float((drawn == index).float().mean()) - chance) <= 4 * error


def test_a_name_is_taken_once() -> None:
    register(SCHEMES["eat"])
    with pytest.raises(ValueError, match="'eat' already"):
        register(type("Mine", (Scheme,), {"name": "eat"}))


def test_all_robust_is_even() -> None:
    scheme = after("eat", (10, 10), (10, 10))
    assert scheme.errors.rates() == [0, 0]
    assert {int(scheme.draw(1, 0, torch.Generator().manual_seed(seed))) for seed in range(20)} == {0, 1}


@pytest.mark.parametrize("right", [0, 5, 10])
def test_single_threat_is_always_drawn(right: int) -> None:
    scheme = after("eat", (right, 10))
    generator = torch.Generator().manual_seed(0)
    assert {int(scheme.draw(1, 0, generator)) for _ in range(50)} == {0}


@pytest.mark.parametrize("name", ["eat", "eat-mixed"])
def test_saved_errors_go_on_as_if_never_saved(name: str) -> None:
    scheme, again = (make_scheme(name, [LINF, L1], [1, 1]) for _ in range(2))
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    for step in range(60):
        if step % 7 == 0:
            state = scheme.state_dict()
            again = make_scheme(name, [LINF, L1], [1, 1])
            again.load_state_dict(state)
            second.set_state(first.get_state())
        drawn = scheme.draw(10, step, first)
        assert torch.equal(again.draw(10, step, second), drawn)
        for each in (scheme, again):
            each.observe(*met(int(drawn[0]), (5 * step) % 11, 10, 2))
    assert scheme.errors.rates() == again.errors.rates()


class Linear(nn.Module):
    """Two logits, w x and 0, of images (B, 1, 2, 2): for label 0 the best point in each ball is known."""

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = torch.tensor(w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1) @ self.w, torch.zeros(len(x))], 1)


MIDDLE = torch.full((6, 1, 2, 2), 0.5)
LABELS = torch.zeros(6, dtype=torch.int64)
SMALL = [Threat("Linf", 0.09), Threat("L2", 0.15), Threat("L1", 0.18)]


def drop(threat: Threat, w: list[float]) -> float:
    """How far the threat can lower w x: eps times the dual norm."""
    sizes = [abs(each) for each in w]
    match threat.norm:
        case "Linf":
            return threat.eps * sum(sizes)
        case "L2":
            return threat.eps * math.hypot(*sizes)
        case _:
            return threat.eps * max(sizes)


FLAT, STEEP, BETWEEN = [1.0, 1.0, 1.0, 1.0], [2.0, 0.1, 0.1, 0.1], [1.0, 1.0, 0.0, 0.0]
STRONGEST = {"Linf": FLAT, "L2": BETWEEN, "L1": STEEP}  # weights against which this norm of SMALL does most


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["max", "msd"])
def test_max_and_msd_find_the_strongest_norms_point(name: str, norm: str) -> None:
    w = STRONGEST[norm]
    drops = [drop(threat, w) for threat in SMALL]
    strongest = [threat.norm for threat in SMALL].index(norm)  # type: ignore[arg-type]
    assert max(drops) == drops[strongest] > 1.05 * sorted(drops)[1]
    points = make_scheme(name, SMALL, [20] * 3).attack(Linear(w), MIDDLE, LABELS, LABELS)
    assert points.threat.tolist() == [[strongest] * 6]
    lowered = (MIDDLE - points.x[0]).flatten(1) @ torch.tensor(w)
    torch.testing.assert_close(lowered, torch.full((6,), drops[strongest]), rtol=0.03, atol=0)


def test_max_is_the_pointwise_maximum(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    found = [apgd(trained, x, y, threat, 5) for threat in THREATS]
    points = make_scheme("max", THREATS, [5] * 3).attack(trained, x, y, torch.zeros_like(y))
    losses = F.cross_entropy(trained(points.x[0]), y, reduction="none")
    highest, index = torch.stack([each.loss for each in found]).max(0)
    torch.testing.assert_close(losses, highest)
    assert points.threat.tolist() == [index.tolist()]
    assert len(set(index.tolist())) >= 2, "a test of one norm would show nothing"


def test_msd_keeps_to_a_ball_and_is_no_weaker_than_one_norm(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    threats = [LINF, L2, Threat("L1", 1.5)]
    x_adv, index = msd(trained, x, y, threats, 6)
    for i, threat in enumerate(threats):
        assert bool(threat.contains(x[index == i], x_adv[index == i]).all())
    assert len(set(index.tolist())) >= 2

    def losses(points: Tensor) -> Tensor:
        return F.cross_entropy(trained(points), y, reduction="none")

    assert bool((losses(x_adv) >= losses(x) - 1e-6).all())
    assert float(losses(x_adv).mean()) > float(losses(msd(trained, x, y, threats[1:2], 6)[0]).mean())


def test_msds_l1_step_is_along_few_entries_that_can_move() -> None:
    """The largest gradients where the box is in the way, then larger and larger: the last of 64 moves, or 31 of 3,072."""
    for entries, moved in ((64, 1), (3072, 31)):
        x = torch.full((1, entries), 0.5, dtype=torch.float64)
        x[:, :3] = 1
        slope = torch.arange(1, entries + 1, dtype=torch.float64)
        slope[:3] = entries + 1
        model = lambda z, slope=slope: torch.stack([-z @ slope, 0 * z[:, 0]], 1)  # noqa: E731
        x_adv, _ = msd(model, x, torch.zeros(1, dtype=torch.int64), [Threat("L1", 0.1)], 5)
        expected = x.clone()
        expected[:, -moved:] += 0.1 / moved
        torch.testing.assert_close(x_adv, expected)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from data import load_dataset

    return load_dataset("digits", "").train.take(40).pixels()


@pytest.mark.parametrize("name", ["eat", "sat"])
def test_one_norm_for_a_batch(name: str, trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    points = make_scheme(name, THREATS, [3] * 3).attack(trained, x, y, torch.ones_like(y))
    assert torch.equal(points.x[0], apgd(trained, x, y, L2, 3).x_best)
    assert points.threat.tolist() == [[1] * 40]


@pytest.mark.parametrize("steps", [[3, 3, 3], [4, 1, 3]])
def test_eat_mixed_attacks_each_image_in_its_norm(
    network: nn.Module, digits: tuple[Tensor, Tensor], steps: list[int]
) -> None:
    x, y = digits
    drawn = torch.arange(40) % 3
    points = make_scheme("eat-mixed", THREATS, steps).attack(network, x, y, drawn)
    assert points.threat.tolist() == [drawn.tolist()]
    for index, threat in enumerate(THREATS):
        whole = apgd(network, x, y, threat, steps[index]).x_best
        assert torch.equal(points.x[0, drawn == index], whole[drawn == index])


def test_avg_is_the_mean_over_the_norms(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    scheme = make_scheme("avg", THREATS, [3] * 3)
    points = scheme.attack(trained, x, y, torch.zeros_like(y))
    logits = torch.stack([trained(apgd(trained, x, y, threat, 3).x_best) for threat in THREATS])
    torch.testing.assert_close(torch.stack([trained(view) for view in points.x]), logits)
    assert points.threat.tolist() == [[0] * 40, [1] * 40, [2] * 40]
    each = torch.stack([F.cross_entropy(one, y, reduction="none") for one in logits])
    torch.testing.assert_close(scheme.loss(logits, y), each.mean(0))


# Two classes, four images of label 0: probability of it under q and r. The third is wrong under q.
Q, R = [0.8, 0.6, 0.4, 0.9], [0.5, 0.7, 0.3, 0.9]


def logits_of(*views: list[float]) -> Tensor:
    return torch.tensor([[[math.log(p), math.log(1 - p)] for p in view] for view in views], dtype=torch.float64)


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_ramp_by_hand() -> None:
    """Mean of the larger cross-entropy, plus lambda times the mean KL over the three images that are right under q."""
    y = torch.zeros(4, dtype=torch.int64)
    loss = make_scheme("ramp", [LINF, L1], [1, 1], options={"ramp_lambda": 1.5}).loss(logits_of(Q, R), y)
    larger = sum(max(-math.log(q), -math.log(r)) for q, r in zip(Q, R, strict=True)) / 4
    pairing = sum(kl(q, r) for q, r in zip(Q, R, strict=True) if q > 0.5) / 3
    assert float(loss.mean()) == pytest.approx(larger + 1.5 * pairing)
    none_right = make_scheme("ramp", [LINF, L1], [1, 1]).loss(logits_of([0.2], [0.3]), y[:1])
    assert float(none_right) == pytest.approx(-math.log(0.2))


def test_trades_by_hand(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """The two versions are the clean image and the adversarial example; cross-entropy is clean, KL from clean to adversarial."""
    scheme = make_scheme("eat", [LINF, L1], [2, 2], trades_beta=6.0)
    y = torch.zeros(4, dtype=torch.int64)
    by_hand = [-math.log(q) + 6 * kl(q, r) for q, r in zip(Q, R, strict=True)]
    assert scheme.loss(logits_of(Q, R), y).tolist() == pytest.approx(by_hand)
    x, labels = digits
    points = scheme.attack(trained, x, labels, torch.ones_like(labels))
    assert torch.equal(points.x[0], x)
    assert torch.equal(points.x[1], apgd(trained, x, labels, L1, 2).x_best)
    assert points.threat.tolist() == [[2] * 40, [1] * 40]
    scheme.observe(*counts((9, 10), (0, 10)))
    drawn = torch.stack([scheme.draw(1, 0, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert 150 < int(drawn.sum()) < 200


def test_standard_training_sees_clean_images(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    scheme = Scheme(THREATS)
    points = scheme.attack(trained, x, y, scheme.draw(40, 0, torch.Generator()))
    assert torch.equal(points.x, x[None])
    assert points.threat.tolist() == [[3] * 40]


@pytest.mark.parametrize(
    ("name", "threats", "n_iters", "beta", "word"),
    [
        ("ramp", THREATS, [1] * 3, None, "two norms"),
        ("msd", THREATS, [1, 2, 1], None, "one number of steps"),
        ("avg", THREATS, [1] * 3, 6.0, "loss of its own"),
        ("ramp", THREATS[:2], [1] * 2, 6.0, "loss of its own"),
        ("best", THREATS, [1] * 3, None, "unknown scheme"),
    ],
)
def test_what_does_not_fit(name: str, threats: list[Threat], n_iters: list[int], beta: float | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make_scheme(name, threats, n_iters, trades_beta=beta)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_scheme_waits_for_the_device(name: str) -> None:
    """Nothing has a value on `meta`: whatever waited for one would fail."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(27, 5))
        x, y = torch.rand(8, 3, 3, 3), torch.zeros(8, dtype=torch.int64)
    threats = [threat for threat in THREATS if threat.norm in SCHEMES[name].norms]
    scheme = make_scheme(name, threats, [2] * len(threats), trades_beta=None)
    drawn = torch.arange(8) % 2 if name == "eat-mixed" else torch.zeros(8, dtype=torch.int64)
    points = scheme.attack(model, x, y, drawn)
    logits = model(points.x.flatten(0, 1)).unflatten(0, points.threat.shape)
    assert scheme.loss(logits, y).shape == (8,)
    assert per_threat_sums(logits, y, points.threat, len(threats) + 1).shape == (len(threats) + 1, 3)


def test_per_threat_sums_by_hand() -> None:
    """Two versions of two images; the second image's second one is clean, and what is not finite stays in its row."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [float("nan"), 0.0]]])
    y = torch.tensor([0, 0])
    told = per_threat_sums(logits, y, torch.tensor([[0, 1], [1, 2]]), 3)
    own = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)) + math.log(1 + math.exp(3))]
    assert told[:2].flatten().tolist() == pytest.approx([own[0], 1, 1, own[1], 0, 2])
    assert math.isnan(told[2, 0])
    assert told[2, 2] == 1
