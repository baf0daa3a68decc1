"""A fourth norm out of one object: the attacks take it, an evaluation and its report have it, and nothing else has to know."""

from __future__ import annotations

import ast
import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
import train
from attacks.apgd import apgd, apgd_each, select_per_example
from attacks.msd import msd
from attacks.multinorm import SCHEMES
from attacks.network import Examples, Network
from attacks.norms import NORMS, NormSpec, register_norm
from attacks.projections import project_linf
from attacks.results import AttackPlan, Evaluation
from attacks.standard import robust_accuracy
from attacks.threat import Threat
from data import load_dataset
from evaluation.curve import curve_radii
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.report import worst_examples, write_report
from evaluation.statistics import evaluation_json

N = 40
PLAN = AttackPlan(n_iter=8)


def blocks(delta: Tensor) -> Tensor:
    """delta (B, C, H, W) -> its 2 x 2 blocks of pixels (B, C, H / 2, W / 2, 4)."""
    return delta.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)


def unblocked(parts: Tensor) -> Tensor:
    """The inverse of `blocks`."""
    b, c, h, w, _ = parts.shape
    return parts.view(b, c, h, w, 2, 2).transpose(3, 4).reshape(b, c, 2 * h, 2 * w)


def steepest_in_blocks(grad: Tensor, keep: Tensor) -> Tensor:
    """Sign of each block's mean gradient, at all its pixels."""
    return unblocked(blocks(grad).sum(4, keepdim=True).sign().expand(-1, -1, -1, -1, 4))


# The largest pixel of any 2 x 2 block that moves: Linf, with steps that are constant on blocks. Its radii are those of Linf.
BLOCKS = NormSpec(
    name="blocks",
    project=project_linf,
    steepest=steepest_in_blocks,
    size=lambda delta: blocks(delta).abs().amax((1, 2, 3, 4)),
    random_start=lambda noise, eps: eps * noise.sign(),
    restarts=(1, 3),
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`blocks`, and L2 under another name with L2's seed, while a test runs."""
    for spec in (BLOCKS, replace(NORMS["L2"], name="Euclid")):
        monkeypatch.setitem(NORMS, spec.name, spec)
        assert register_norm(spec) is spec


@pytest.fixture(scope="module")
def examples() -> Examples:
    test = load_dataset("digits", "").test.take(N)
    return Examples(test.images, test.labels, test.levels)


def test_blocks_and_back() -> None:
    x = torch.rand(2, 3, 6, 4)
    assert torch.equal(unblocked(blocks(x)), x)
    assert blocks(x)[1, 2, 1, 0].tolist() == x[1, 2, 2:4, 0:2].flatten().tolist()


@pytest.mark.parametrize("folder", ["attacks", "evaluation"])
def test_no_code_but_the_norms_own_asks_for_a_norm_by_name(folder: str) -> None:
    for path in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
        tree = ast.parse(path.read_text())
        named = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in ("Linf", "L2", "L1")
        ]
        # Schemes have the norms of their papers as defaults, RobustBench has boards of some norms.
        assert path.name in ("norms.py", "multinorm.py", "robustbench.py") or not named, f"{path}: {named}"


@pytest.mark.usefixtures("registered")
def test_another_norm_of_a_known_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'L2' already"):
        register_norm(replace(NORMS["L2"], seed=7))


def test_an_unknown_norm_is_refused_until_it_is_registered() -> None:
    with pytest.raises(ValueError, match="Linf L2 L1"):
        Threat("blocks", 0.1)


def test_a_seed_comes_from_the_name_where_none_is_given() -> None:
    assert BLOCKS.seed_number == zlib.crc32(b"blocks")
    assert [NORMS[norm].seed_number for norm in ("Linf", "L2", "L1")] == [0, 1, 2]


@pytest.mark.usefixtures("registered")
def test_the_attacks_of_training_take_it(network: nn.Module, examples: Examples) -> None:
    x, y = examples.x(torch.arange(N)), examples.y
    threat, l1 = Threat("blocks", 0.1), Threat("L1", 2.0)
    found = apgd(network, x, y, threat, n_iter=5)
    assert bool(threat.contains(x, found.x_best).all())
    assert int(found.broken.sum()) > int((network(x).argmax(1) != y).sum())
    which = torch.arange(N) % 2
    mixed = apgd_each(network, x, y, which, [(threat, 5), (l1, 7)])
    expected = select_per_example([found.x_best, apgd(network, x, y, l1, n_iter=7).x_best], which)
    torch.testing.assert_close(mixed, expected)
    x_adv, whose = msd(network, x, y, [threat, l1], n_iter=6)
    assert set(whose.tolist()) == {0, 1}
    assert bool(torch.where(whose == 0, threat.contains(x, x_adv), l1.contains(x, x_adv)).all())


@pytest.mark.usefixtures("registered")
def test_l2_under_another_name_gives_the_figures_of_l2(network: nn.Module, examples: Examples) -> None:
    """With L2's seed to the bit, with one of its own from other random starts."""
    x = examples.x(torch.arange(N))
    l2, euclid = Threat("L2", 0.4), Threat("Euclid", 0.4)
    result = robust_accuracy(network, x, examples.y, [l2, euclid], PLAN)
    assert torch.equal(result.logs[l2].passes, result.logs[euclid].passes)
    assert torch.equal(result.logs[l2].broken_by, result.logs[euclid].broken_by)
    assert torch.equal(result.x_adv[l2], result.x_adv[euclid])
    assert 0 < int(result.robust(l2).sum()) < N
    NORMS["Euclid"] = replace(NORMS["Euclid"], seed=None)
    other = robust_accuracy(network, x, examples.y, [euclid], PLAN)
    assert not torch.equal(other.x_adv[euclid], result.x_adv[euclid])
    assert abs(int(other.robust(euclid).sum()) - int(result.robust(euclid).sum())) <= 2


def check(result: Evaluation, threats: list[Threat]) -> None:
    assert [str(run) for run in result.logs[threats[0]].runs] == [
        "APGD-CE restart 1",
        "APGD-T target 1",
        "APGD-T target 2",
        "APGD-T target 3",
    ]
    assert list(result.accuracies()) == ["clean", "blocks", "L1", "average", "union"]
    assert 0 < int(result.robust(threats[0]).sum()) < int(result.clean.sum())


@pytest.mark.usefixtures("registered")
def test_it_is_evaluated_stored_and_reported(network: nn.Module, examples: Examples, tmp_path: Path) -> None:
    threats = [Threat("blocks", 0.1), Threat("L1", 2.0)]
    in_memory = robust_accuracy(network, examples.x(torch.arange(N)), examples.y, threats, PLAN)
    check(in_memory, threats)
    assert "  blocks  " in str(in_memory)
    options = EvaluationOptions(curve=curve_radii(threats, {"blocks": (), "L1": ()}), progress=False)
    result = evaluate(network, examples, threats, PLAN, options, tmp_path)
    check(result, threats)
    assert torch.equal(result.robust(threats[0]), in_memory.robust(threats[0]))
    assert (tmp_path / "adv_blocks_0.1.npy").exists()
    names = [str(digit) for digit in range(10)]
    shown = worst_examples(Network(network, torch.device("cpu")), examples, result, tmp_path, names)
    assert any("blocks" in example for example in shown)
    content = json.loads(json.dumps(evaluation_json(result)))
    assert list(content["curve"]) == ["blocks", "L1"]
    content |= {
        "settings": {"model_name": "net", "n_ex": N, "dataset": "digits", "attacks": "standard", "n_iter": 8},
        "environment": {
            "command": ["eval.py"],
            "started": "today",
            "device": "cpu",
            "packages": {"torch": "2"},
            "commit": "none",
        },
        "seconds": 1.0,
    }
    write_report(tmp_path / "report.html", content, examples.y.tolist(), names, shown)
    assert "blocks, radius 0.1" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("registered")
def test_the_union_makes_its_first_run_among_the_first(network: nn.Module, examples: Examples) -> None:
    """In whatever order the norms are given, a norm with a brief run goes first."""
    threats = [Threat("blocks", 0.1), Threat("L1", 2.0)]
    plan, x = replace(PLAN, union_only=True), examples.x(torch.arange(N))
    unions = [robust_accuracy(network, x, examples.y, order, plan) for order in (threats, threats[::-1])]
    for result in unions:
        assert torch.equal(result.logs[threats[1]].passes[:, 0] > 0, result.clean)
    assert torch.equal(unions[0].union, unions[1].union)


@pytest.mark.usefixtures("registered")
def test_autoattack_is_refused_where_that_library_does_not_know_the_norm(
    network: nn.Module, examples: Examples
) -> None:
    with pytest.raises(ValueError, match=r"^pyautoattack.* knows no norm blocks; take standard$"):
        evaluate(
            network, examples, [Threat("blocks", 0.1)], AttackPlan("autoattack"), EvaluationOptions(progress=False)
        )


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """eval.py in the norms `blocks` and L1, of a network of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    flags = ["--model_name=nets.py:make", "--dataset=digits", "--n_ex=30", "--n_iter=5", "--device=cpu"]
    return [*flags, "--l_norms=blocks L1", "--l_eps=0.1 2"]


@pytest.mark.usefixtures("registered")
def test_eval_takes_it_as_a_flag(command: list[str]) -> None:
    folder = eval_script.main(command)
    content = json.loads((folder / "eval.json").read_text())
    assert list(content["norms"]) == ["blocks", "L1"]
    assert list(content["accuracy"]) == ["clean", "blocks", "L1", "average", "union"]
    assert (folder / "adv_blocks_0.1.npy").exists()
    assert "blocks, radius 0.1" in (folder / "report.html").read_text()


@pytest.mark.usefixtures("registered")
def test_eval_refuses_autoattack_for_it_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        eval_script.main([*command, "--attacks=autoattack"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "argument --attacks: pyautoattack" in error
    assert error.count("\n") == 1


TRAIN = [
    "--dataset=digits",
    "--width=4",
    "--n_ex_train=64",
    "--batch_size=16",
    "--epochs=2",
    "--at_iter=2",
    "--device=cpu",
]
TRAIN += ["--attack=apgd", "--l_norms=blocks L1"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_with_it(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train.main([*TRAIN, f"--multinorm={scheme}", "--l_eps=0.1 2", f"--save_dir={tmp_path}"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(records[0]["norms"]) == ["blocks", "L1"]
    assert any(record["norms"]["blocks"]["drawn"] > 0 for record in records)
    assert "blocks 0.1" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
def test_a_run_evaluates_and_reports_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TRAIN, "--l_eps=0.1 2", f"--save_dir={tmp_path}", "--eval_norms=blocks L2 L1"]
    folder = train.main([*flags, "--final_eval", "--n_ex_final=6"])
    content = json.loads((folder / "eval.json").read_text())
    assert list(content["accuracy"]) == ["clean", "blocks", "L2", "L1", "average", "union"]
    assert "blocks, radius 0.1" in (folder / "report.html").read_text()
    with pytest.raises(SystemExit):
        train.main(TRAIN)
    assert "digits has no radius of its own for blocks" in capsys.readouterr().err
