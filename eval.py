"""Robust accuracy of a network for several Lp norms and their union.

python eval.py --model_name=runs/RUN/ep_80.pth --n_ex=1000                   one's own run
python eval.py --model_name=pretr_L1.pth --l_norms='Linf L2 L1'              the authors' networks (downloaded to --model_dir)
python eval.py --model_name=RB_Engstrom2019Robustness                        RobustBench's
python eval.py --model_name=my_nets.py:make_net                              any: the function returns a module on [0, 1] images
python eval.py --dataset=imagenet --data_dir=DIR --model_name=RB_Salman2020Do_R50    DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg

The standard evaluation: APGD-CE and APGD-T, 100 steps, 10 restarts in all for each norm (arXiv 2105.12508, section 5),
L1 after a brief run of a fifth of the steps at the radius itself.
"""

from __future__ import annotations

import hashlib
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attacks.evaluator import Examples, Network
from attacks.norms import NORMS
from attacks.plan import ATTACKS, AttackPlan
from attacks.results import Evaluation, table
from attacks.threat import threats_for
from data import DATASETS, FolderSplit, Split, load_dataset
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.examples import worst_examples
from evaluation.report import write_report
from evaluation.statistics import evaluation_json, paired, robustbench_fields
from models.pretrained import check_fits, load_model
from models.robustbench_zoo import published_preparation
from utils.checkpoint import fingerprint
from utils.cli import Parser, add_flag, float_list, natural_int, positive_int, word_list
from utils.distributed import choose_device, local_device, processes, run_on_rank0
from utils.precision import AMPS, check_amp, set_up_torch
from utils.run_folder import difference_table, environment, new_folder, newest_folder, read_json, write_json

# An evaluation can go on only if none of these changed. Not the device, the batch size or the number of processes.
DECIDE = (
    "dataset",
    "image_size",
    "n_ex",
    "l_norms",
    "l_eps",
    "attacks",
    "n_iter",
    "n_restarts",
    "n_targets",
    "union_only",
    "curve",
    "amp",
    "seed",
)


def make_parser() -> Parser:
    """Every flag with its unit and default."""
    parser = Parser(prog="eval.py", description=__doc__)
    model = parser.add_argument_group("network")
    add_flag(
        model,
        "--model_name",
        help="checkpoint, pretr_{Linf,L2,L1}.pth, RB_{id}[_{Linf,L2}], FILE.py:FUNCTION[@CHECKPOINT] (needed)",
    )
    add_flag(model, "--model_dir", default="./pretrained", help="folder for pretr_* and RB_* files (%(default)s)")
    points = parser.add_argument_group("points")
    add_flag(
        points, "--dataset", choices=DATASETS, help="data set (the one the checkpoint was trained on, else cifar10)"
    )
    add_flag(
        points,
        "--data_dir",
        default="./datasets",
        help="folder that holds or gets CIFAR's folder, or holds train/CLASS/*.jpg and val/CLASS/*.jpg (%(default)s)",
    )
    add_flag(
        points,
        "--image_size",
        type=positive_int,
        help="height and width of the images in pixels, for imagenet and imagefolder: resized to 8/7 of it and cut at the centre "
        "(the checkpoint's; an RB_ network's published way; else 224)",
    )
    add_flag(
        points,
        "--n_ex",
        type=positive_int,
        help="number of test points, the first ones (1000, or all if there are fewer)",
    )
    attack = parser.add_argument_group("attack")
    add_flag(
        attack,
        "--l_norms",
        type=word_list,
        default=list(NORMS),
        help="norms to attack in, with blanks between ('Linf L2 L1')",
    )
    add_flag(
        attack,
        "--l_eps",
        type=float_list,
        help="a radius per norm, in pixels of [0, 1], fractions too (the data set's)",
    )
    add_flag(
        attack,
        "--attacks",
        choices=ATTACKS,
        default="standard",
        help="standard: APGD-CE, APGD-T (L1: a brief run first); fast: one APGD-CE; autoattack: standard, FAB-T, Square (%(default)s)",
    )
    add_flag(
        attack, "--n_iter", type=positive_int, default=100, help="steps of each APGD run, at least 4 (%(default)s)"
    )
    add_flag(attack, "--n_restarts", type=positive_int, help="runs of APGD-CE in each norm (Linf, L2: 1, L1: 5)")
    add_flag(attack, "--n_targets", type=natural_int, help="runs of APGD-T in each norm (Linf, L2: 9, L1: 5; fast: 0)")
    add_flag(
        attack, "--union_only", action="store_true", help="worst case alone: a point broken in one norm is done (off)"
    )
    add_flag(
        attack, "--curve", action="store_true", help="also accuracy at radii from 0 to 2 eps, one APGD-CE each (off)"
    )
    add_flag(attack, "--only_clean", action="store_true", help="no attack, clean accuracy alone (off)")
    add_flag(
        attack,
        "--amp",
        choices=AMPS,
        default="off",
        help="number format of the attack's passes; what it breaks is checked in float32; fp16: CUDA only (%(default)s: float32)",
    )
    add_flag(attack, "--seed", type=natural_int, default=0, help="of the random starts (%(default)s)")
    run = parser.add_argument_group("run")
    add_flag(run, "--batch_size_eval", type=positive_int, default=250, help="points attacked at once (%(default)s)")
    add_flag(run, "--save_dir", default="./results", help="folder in which the result's folder is made (%(default)s)")
    add_flag(
        run,
        "--resume",
        action="store_true",
        help="go on with the same command's newest evaluation, if there is one (off)",
    )
    add_flag(
        run, "--baseline", help="another evaluation's eval.json: paired differences to it, on the same points (none)"
    )
    add_flag(
        run,
        "--robustbench_json",
        action="store_true",
        help="also the fields of RobustBench's model_info, a file a norm (off)",
    )
    add_flag(run, "--threads", type=positive_int, help="CPU threads (PyTorch's choice: the cores)")
    add_flag(run, "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s: the best there is)")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Load, attack, print the table, save eval.json and the adversarial images; the result's folder."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.model_name:
        parser.error("argument --model_name: name the network to evaluate, such as --model_name=runs/RUN/ep_80.pth")
    check_flags(args, parser)
    with parser.blame("--baseline"):
        baseline = read_json(args.baseline) if args.baseline else None
    with parser.blame("--device"):
        device = local_device(choose_device(args.device))
    with parser.blame("--amp"):
        check_amp(device, args.amp)
    set_up_torch(args.threads, tf32=False)
    with parser.blame("--model_name"):
        loaded = load_model(args.model_name, args.model_dir, args.dataset or "cifar10")
    args.dataset = args.dataset or loaded.about.get("dataset", "cifar10")
    threats = [] if args.only_clean else threats_for(args.dataset, args.l_norms, args.l_eps)
    args.l_eps = [threat.eps for threat in threats]
    image_size = args.image_size or loaded.about.get("image_size")
    with parser.blame("--data_dir"):
        prepare = published_preparation(loaded.spec, image_size)
        data = load_dataset(args.dataset, args.data_dir, image_size or 224, prepare)
    of_files = isinstance(data.test, FolderSplit)
    if args.image_size and not of_files:
        parser.error(f"argument --image_size: the images of {args.dataset} have one size, leave this flag out")
    args.image_size = data.shape[1] if of_files else None
    if args.n_ex and args.n_ex > len(data.test):
        parser.error(f"argument --n_ex: {args.dataset} has {len(data.test)} test points, {args.n_ex} were asked for")
    args.n_ex = args.n_ex or min(1000, len(data.test))
    if baseline:
        with parser.blame("--baseline"):
            check_baseline(baseline, args)
    model = loaded.model.eval().to(device).requires_grad_(False)
    with parser.blame("--model_name"):
        check_fits(model, data.shape, data.num_classes)
    with parser.blame("--data_dir"):
        test = data.test.first(args.n_ex).in_memory()
    asked = {name: getattr(args, name) for name in DECIDE} | {"network": fingerprint(model)}
    if of_files:
        asked["points"] = points_fingerprint(test)  # the data set's name does not tell which they are
    plan = attack_plan(args)
    asked["runs"] = [f"{threat}: {run}" for threat in threats for run in plan.runs(threat.norm, data.num_classes)]
    parts = ["eval", args.dataset, *args.model_name.split("/")[-2:], f"n{args.n_ex}"]
    with processes(device) as share:
        # The first process chooses the folder; what went wrong there is told in all of them.
        with parser.blame("--resume" if args.resume else "--save_dir"):
            folder = run_on_rank0(lambda: folder_for(args.save_dir, parts, asked, args.resume))
        if share[0] == 0:
            attacked = ", ".join(map(str, threats)) or "no attack"
            print(
                f"{args.model_name} on {args.n_ex} test points of {args.dataset}: {attacked}; on {device}", flush=True
            )
        examples = Examples(test.images, test.labels, test.levels)
        options = EvaluationOptions(device, args.batch_size_eval, args.amp, args.curve, *share)
        start, env = time.time(), environment(device)
        result = evaluate(model, examples, threats, plan, options, folder)
        if share[0] == 0:
            finish(result, args, baseline, folder, env, time.time() - start)
            shown = worst_examples(Network(model, device), examples, result, folder, data.class_names)
            content, labels = read_json(folder / "eval.json"), test.labels.tolist()
            write_report(folder / "report.html", content, labels, data.class_names, shown)
            print(f"saved in {folder}; open report.html there to look at it")
    return folder


def attack_plan(args: Namespace) -> AttackPlan:
    """What the flags ask for."""
    return AttackPlan(args.attacks, args.n_iter, args.n_restarts, args.n_targets, args.union_only, args.seed)


def check_flags(args: Namespace, parser: Parser) -> None:
    """Usage errors for what does not fit together."""
    if args.n_iter < 4:
        parser.error("argument --n_iter: L1 is attacked in three stages, give at least 4 steps")
    if args.robustbench_json and (args.union_only or args.only_clean):
        parser.error(
            "argument --robustbench_json: it needs each norm's accuracy; leave --union_only and --only_clean out"
        )
    if args.curve and args.union_only:
        parser.error("argument --curve: it needs each norm's accuracy, which --union_only leaves out; give one of them")
    with parser.blame("--l_norms"):
        threats_for("cifar10", args.l_norms)
    with parser.blame("--l_eps"):
        threats_for("cifar10", args.l_norms, args.l_eps)
    with parser.blame("--attacks"):
        for norm in args.l_norms:
            attack_plan(args).runs(norm, num_classes=2)


def finish(
    result: Evaluation,
    args: Namespace,
    baseline: dict[str, Any] | None,
    folder: Path,
    env: dict[str, Any],
    seconds: float,
) -> None:
    """Save eval.json and what else was asked for; print the table, differences and warnings."""
    content = evaluation_json(result) | {"seconds": round(seconds, 1), "settings": vars(args), "environment": env}
    if baseline:
        content["difference_to_baseline"] = paired(content["outcomes"], baseline["outcomes"])
    write_json(folder / "eval.json", content)
    if args.robustbench_json:
        for norm in content["norms"]:
            write_json(folder / f"robustbench_{norm}.json", robustbench_fields(content, norm))
    print(table(content["accuracy"]))
    if baseline:
        print(difference_table(content["difference_to_baseline"], args.baseline))
    for warning in result.warnings:
        print(f"WARNING: {warning}")
    passes = sum(sum(about["forward_passes"]) for about in content["norms"].values())
    print(f"{seconds:.0f} s; the attacks judged {passes} images")


def folder_for(save_dir: str, parts: list[str], asked: dict[str, Any], resume: bool) -> Path:
    """A new folder, or to resume the newest one of this name. Raises ValueError if that was made with other settings."""
    newest = newest_folder(save_dir, parts) if resume else None
    if newest is None or not (newest / "asked.json").exists():
        folder = new_folder(save_dir, parts)
        write_json(folder / "asked.json", asked)
        return folder
    before = read_json(newest / "asked.json")
    different = [name for name in asked if before.get(name) != asked[name]]
    if different:
        raise ValueError(f"{newest} was made with another {', '.join(different)}: give the same, or leave --resume out")
    return newest


def points_fingerprint(test: Split) -> str:
    """SHA-256 of the images and labels."""
    digest = hashlib.sha256(test.images.numpy().data)
    digest.update(test.labels.numpy().data)
    return digest.hexdigest()


def check_baseline(baseline: dict[str, Any], args: Namespace) -> None:
    """Raises ValueError unless the other evaluation is of the same points."""
    settings = baseline.get("settings", {})
    if "outcomes" not in baseline or (settings.get("dataset"), settings.get("n_ex")) != (args.dataset, args.n_ex):
        raise ValueError(f"{args.baseline} is not an evaluation of {args.n_ex} test points of {args.dataset}")


if __name__ == "__main__":
    main()
