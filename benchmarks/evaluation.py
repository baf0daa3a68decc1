"""Cost and agreement of evaluations: ours, its options, and pyautoattack's APGD-CE + APGD-T, on the same network and points in one run.

python benchmarks/evaluation.py --model_name=pretr_Linf.pth --model_dir=DIR --data_dir=DIR --n_ex=50

Prints a row each: forward passes of an image, wall time, robust accuracy for each norm and union. docs/evaluation.md has results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from attacks.network import Examples
from attacks.norms import NORMS
from attacks.results import AttackPlan
from attacks.threat import Threat
from config import threats_of
from data import load_dataset
from evaluation.evaluate import EvaluationOptions, evaluate
from models.pretrained import load_model
from utils.cli import Parser, add_flag, floats, non_negative_int, positive_int, words
from utils.distributed import Process, choose_device
from utils.precision import Amp

OURS: dict[str, tuple[bool, Amp]] = {  # union only, format of the attack's passes
    "ours, standard": (False, "off"),
    "ours, standard, bf16": (False, "bf16"),
    "ours, union only": (True, "off"),
    "ours, union only, bf16": (True, "bf16"),
}
OTHER = "pyautoattack"


class Counted:
    """A network that counts the images it judges."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.images = model, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


def library(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threats: Sequence[Threat], batch_size: int
) -> dict[str, float]:
    """Accuracies in per cent under pyautoattack's APGD-CE and APGD-T."""
    from pyautoattack import AutoAttack

    standing = torch.ones(len(y), dtype=torch.bool, device=y.device)
    rows: dict[str, float] = {}
    for threat in threats:
        attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=0, device=x.device)
        attack.attacks_to_run = ["apgd-ce", "apgd-t"]
        x_adv = attack.run_standard_evaluation(x, y, batch_size=batch_size)[0]
        with torch.no_grad():
            robust = torch.cat([model(part).argmax(1) for part in x_adv.split(batch_size)]) == y
        standing &= robust
        rows[threat.norm] = round(100 * float(robust.float().mean()), 2)
    return rows | {"union": round(100 * float(standing.float().mean()), 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what was asked for, a row each."""
    parser = Parser(prog="benchmarks/evaluation.py", description=__doc__)
    add_flag(parser, "--model_name", default="pretr_Linf.pth", help="as for eval.py (%(default)s)")
    add_flag(parser, "--model_dir", default="./pretrained", help="(%(default)s)")
    add_flag(parser, "--data_dir", default="./datasets", help="(%(default)s)")
    add_flag(parser, "--dataset", default="cifar10", help="(%(default)s)")
    add_flag(parser, "--n_ex", type=positive_int, default=50, help="first test points (%(default)s)")
    add_flag(parser, "--l_norms", type=words, default=list(NORMS), help="('Linf L2 L1')")
    add_flag(parser, "--l_eps", type=floats, help="a radius per norm (the data set's)")
    add_flag(parser, "--batch_size_eval", type=positive_int, default=250, help="points attacked at once (%(default)s)")
    add_flag(parser, "--seed", type=non_negative_int, default=0, help="(%(default)s)")
    add_flag(parser, "--device", default="auto", help="(%(default)s)")
    add_flag(parser, "--only", type=words, help=f"rows by number, 0 is {OTHER}, then {', '.join(OURS)} (all)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    model = load_model(args.model_name, args.model_dir, args.dataset).model.eval().to(device).requires_grad_(False)
    test = load_dataset(args.dataset, args.data_dir).test.take(args.n_ex).in_memory()
    x, y = test.pixels()
    threats = threats_of(args.dataset, args.l_norms, args.l_eps)
    print(
        f"{args.model_name}, {args.n_ex} points, {', '.join(map(str, threats))}; {torch.get_num_threads()} threads, {device}"
    )
    print("| | passes | seconds | accuracy (%) |\n|---|---|---|---|", flush=True)
    for number, name in enumerate([OTHER, *OURS]):
        if args.only and str(number) not in args.only:
            continue
        counted, start = Counted(model), time.time()
        if name == OTHER:
            rows = library(counted, x.to(device), y.to(device), threats, args.batch_size_eval)
        else:
            union_only, amp = OURS[name]
            examples = Examples(test.images, test.labels, test.levels)
            plan = AttackPlan(union_only=union_only, seed=args.seed)
            options = EvaluationOptions(Process(device), args.batch_size_eval, amp, progress=False)
            result = evaluate(counted, examples, threats, plan, options)
            rows = {key: row["accuracy"] for key, row in result.accuracies().items() if key != "average"}
        told = ", ".join(f"{key} {value:g}" for key, value in rows.items())
        print(f"| {name} | {counted.images} | {time.time() - start:.0f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
