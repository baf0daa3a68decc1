"""Networks whose answers are not finite, of another shape or an exception, at some step or for some images: never robust without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
from attacks import AttackPlan, NetworkError, Threat, apgd, robust_accuracy
from data import load_dataset

N = 40
THREATS = [Threat("Linf", 0.1), Threat("L2", 0.4), Threat("L1", 2.0)]
PLAN = AttackPlan(n_iter=10)


class Linear(nn.Module):
    """A linear classifier of digits, right of nearly all of them, and easy to attack."""

    def __init__(self) -> None:
        super().__init__()
        x, y = load_dataset("digits", "").train.pixels()
        design = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1).double()
        targets = torch.nn.functional.one_hot(y, 10).double()
        weight = torch.linalg.solve(design.T @ design + torch.eye(65, dtype=torch.double), design.T @ targets).float()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight[:-1] + self.weight[-1]


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is `value` in its first entry for some rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float, rows: Tensor) -> Tensor:
        ctx.value, ctx.rows = value, rows
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone()
        grad[ctx.rows, 0, 0, 0] = ctx.value
        return grad, None, None


def gradient(value: float, rows: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda net, x: net(BadGradient.apply(x, value, rows(x)))


def logits(value: float, rows: Callable[[Tensor], Tensor], column: int | None = None) -> Any:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x).clone()
        where = torch.zeros_like(out, dtype=torch.bool)
        where[:, slice(None) if column is None else column] = True
        return torch.where(where & rows(x)[:, None], value, out)

    return forward


def everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def bright(x: Tensor) -> Tensor:
    """Some images, clean and attacked."""
    return x.flatten(1).mean(1) > 0.32


def attacked(x: Tensor) -> Tensor:
    """Images that no clean one is like: digits are multiples of 1/16."""
    return ((x * 16).round() != x * 16).flatten(1).any(1)


NAN, INF = float("nan"), float("inf")

# What is not finite, in the answers of the linear classifier.
BAD: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradients NaN": gradient(NAN, everywhere),
    "gradients infinite": gradient(INF, everywhere),
    "gradients NaN for some": gradient(NAN, bright),
    "gradients NaN under attack": gradient(NAN, attacked),
    "logits NaN": logits(NAN, everywhere),
    "logits NaN for some": logits(NAN, bright),
    "logits NaN under attack": logits(NAN, attacked),
    "logits infinite": logits(INF, everywhere),
    "a logit infinite for some": logits(INF, bright, column=3),
    "a logit minus infinity": logits(-INF, everywhere, column=3),
    "a logit NaN under attack": logits(NAN, attacked, column=0),
}


class Bad(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.answer = Linear(), (BAD | OTHER)[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.net, x)


@pytest.mark.parametrize("kind", list(BAD))
def test_what_is_not_finite_is_never_right_or_robust_without_a_word(kind: str) -> None:
    x, y = load_dataset("digits", "").test.take(N).pixels()
    sound = robust_accuracy(Linear().eval(), x, y, THREATS, PLAN)
    found = robust_accuracy(Bad(kind).eval(), x, y, THREATS, PLAN)
    with torch.no_grad():
        clean = Bad(kind)(x)
    bad = ~clean.isfinite().all(1)
    top = clean.max(1)
    assert not (found.clean & ~top.values.isfinite()).any()
    assert found.clean_not_finite is not None
    assert torch.equal(found.clean_not_finite, bad)
    rows = found.accuracies()
    assert rows["clean"].get("not_finite", 0) == int(bad.sum())
    for threat in THREATS:
        name, robust = threat.norm, found.robust(threat)
        odd = found.not_finite()[name]
        assert rows[name].get("not_finite", 0) == int(odd.sum())
        if "for some" not in kind and found.clean.any():
            assert odd[found.clean].all()  # all that was attacked
        # An accuracy above the sound network's is an upper bound, in the table, in eval.json and in a warning.
        if int(robust.sum()) > int(sound.robust(threat).sum()):
            assert rows[name]["upper_bound"]
            assert rows["union"]["upper_bound"]
            assert any("may be far too high" in warning for warning in found.warnings)
            assert "upper bound   NOT FINITE at" in str(found)
    if bad.any() or any(log.not_finite.any() for log in found.logs.values()):
        assert any("infinite or NaN" in warning for warning in found.warnings)
        assert "NOT FINITE at" in str(found)


def test_entries_that_are_not_finite_hide_no_others() -> None:
    """One NaN in each gradient: the attack goes on with the rest, and breaks nearly what it breaks without."""
    x, y = load_dataset("digits", "").test.take(N).pixels()
    for threat in THREATS:
        sound, bad = (apgd(net.eval(), x, y, threat, n_iter=20) for net in (Linear(), Bad("gradients NaN")))
        assert int(bad.broken.sum()) >= int(sound.broken.sum()) - 3
        assert bad.x_adv.isfinite().all()


def answers(kind: str) -> Callable[[nn.Module, Tensor], Any]:
    def forward(net: nn.Module, x: Tensor) -> Any:
        out, hit = net(x), bool(attacked(x).any()) or "always" in kind
        if not hit:
            return out
        match kind.removesuffix(" always"):
            case "fewer rows":
                return out[:-1]
            case "more rows":
                return torch.cat([out, out])
            case "one dimension":
                return out.flatten()
            case "other classes":
                return out[:, :5]
            case "a tuple":
                return out, out
            case "complex":
                return out.to(torch.complex64)
            case "an exception":
                raise KeyError("somewhere")
        raise AssertionError(kind)

    return forward


SHAPES = ("fewer rows", "more rows", "one dimension", "a tuple", "complex", "an exception")
OTHER = {kind: answers(kind) for when in ("", " always") for kind in (f"{each}{when}" for each in SHAPES)}


@pytest.mark.parametrize("kind", OTHER)
def test_another_answer_names_the_images(kind: str) -> None:
    x, y = load_dataset("digits", "").test.take(N).pixels()
    with pytest.raises(NetworkError, match=r"the network failed on images? [0-9]+") as error:
        robust_accuracy(Bad(kind).eval(), x, y, THREATS, PLAN, batch_size=7)
    assert "\n" not in str(error.value)


NET = """
import sys

sys.path.insert(0, {root!r})
from tests.test_bad_networks import Bad


def make():
    return Bad({kind!r})
"""


@pytest.mark.parametrize("kind", ["gradients NaN", "logits NaN for some"])
def test_table_json_and_page_say_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET.format(root=str(Path(__file__).parents[1]), kind=kind))
    flags = ["--model_name=nets.py:make", "--dataset=digits", "--n_ex=40", "--n_iter=10", "--device=cpu"]
    folder = eval_script.main(flags)
    rows = json.loads((folder / "eval.json").read_text())["accuracy"]
    assert all(rows[name]["not_finite"] for name in ("Linf", "L2", "L1", "average", "union"))
    out, page = capsys.readouterr().out, (folder / "report.html").read_text()
    for text in (out, page):
        assert f"NOT FINITE at {rows['union']['not_finite']}" in text
        assert "infinite or NaN" in text
    again = json.loads((eval_script.main([*flags, "--resume"]) / "eval.json").read_text())
    assert again["accuracy"] == rows


def test_what_was_found_before_an_exception_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = NET.format(root=str(Path(__file__).parents[1]), kind="gradients NaN for some").replace("Bad(", "Counts(")
    counts = "\n\nclass Counts(Bad):\n    passes = 0\n\n    def forward(self, x):\n        Counts.passes += 1\n"
    counts += "        if Counts.passes > LIMIT:\n            raise MemoryError('no room')\n        return super().forward(x)\n"
    flags = ["--model_name=nets.py:make", "--dataset=digits", "--n_ex=40", "--n_iter=10", "--device=cpu"]
    found = {}
    for limit in (10**9, 60):
        Path("nets.py").write_text(f"LIMIT = {limit}\n{text}{counts}")
        if limit == 10**9:
            found["whole"] = eval_script.main([*flags, "--save_dir=whole"])
            continue
        with pytest.raises(SystemExit) as stop:
            eval_script.main([*flags, "--save_dir=cut"])
        assert stop.value.code == 1
        [line] = capsys.readouterr().err.splitlines()
        assert "the network failed on image" in line
        assert "MemoryError: no room" in line
        assert "go on with: python" in line
        [cut] = Path("cut").iterdir()
        assert "MemoryError" in (cut / "error.txt").read_text()
        Path("nets.py").write_text(f"LIMIT = 1000000000\n{text}{counts}")
        found["cut"] = eval_script.main([*flags, "--save_dir=cut", "--resume"])
    one, other = (json.loads((found[name] / "eval.json").read_text()) for name in ("whole", "cut"))
    assert one["outcomes"] == other["outcomes"]
