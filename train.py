"""Adversarial training for several Lp norms (E-AT, arXiv 2105.12508), and fine-tuning of any network to them.

python train.py --attack=apgd --l_norms='Linf L1'                                    E-AT from scratch
python train.py --attack=apgd --l_norms=L2 --l_eps=0.5 --at_iter=10                  one norm
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --lr-schedule=piecewise-ft --model_name=pretr_Linf.pth
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --model_name=RB_Engstrom2019Robustness
python train.py --dataset=digits --attack=apgd --l_norms='Linf L1' --final_eval      on a laptop, in minutes

Without --attack the training is standard: no adversarial points.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attacks.apgd import Model, apgd
from attacks.multinorm import EAT
from attacks.results import Evaluation, as_json, summarise
from attacks.standard import evaluate
from attacks.threat import NORMS, RADII, Threat, threats_for
from attacks.work import Budget, Points
from data import DATASETS, Dataset, Split, batches, load_dataset, number_of_batches, on_device
from models import Spec, build_model
from models.preact_resnet import ACTIVATIONS
from models.pretrained import check_fits, check_one_point, load_model
from utils.checkpoint import save_whole
from utils.cli import (
    Parser,
    add_flag,
    float_list,
    int_list,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    word_list,
)
from utils.run import append_json_line, environment, new_folder, table, write_json
from utils.schedules import lr_schedule
from utils.speed import AMPS, check_format, full_precision, in_format, set_up
from utils.training import Meter, choose_device, console_line, eval_mode, frozen, generator, parameter_groups, set_lr


def make_parser() -> Parser:
    """Every flag with its unit and default."""
    parser = Parser(prog="train.py", description=__doc__)
    model = parser.add_argument_group("network")
    add_flag(
        model, "--finetune_model", action="store_true", help="start from --model_name instead of random weights (off)"
    )
    add_flag(
        model,
        "--model_name",
        help="the start of --finetune_model (needed with it): checkpoint, pretr_{Linf,L2,L1}.pth, RB_{id}[_{Linf,L2}], FILE.py:FUNCTION",
    )
    add_flag(model, "--model_dir", default="./pretrained", help="folder for pretr_* and RB_* files (%(default)s)")
    add_flag(
        model,
        "--act",
        choices=list(ACTIVATIONS),
        help="activation of the PreAct ResNet-18 (softplus1, or the checkpoint's)",
    )
    add_flag(model, "--width", type=positive_int, help="channels of its first stage (64; digits: 16)")
    points = parser.add_argument_group("points")
    add_flag(points, "--dataset", choices=DATASETS, default="cifar10", help="data set (%(default)s)")
    add_flag(
        points, "--data_dir", default="./datasets", help="folder that holds or gets cifar-10-batches-py (%(default)s)"
    )
    add_flag(points, "--n_ex_train", type=positive_int, help="train on the first so many points (all)")
    add_flag(points, "--batch_size", type=positive_int, default=128, help="points an update (%(default)s)")
    sgd = parser.add_argument_group("optimisation")
    add_flag(sgd, "--epochs", type=positive_int, help="passes over the training points (80; fine-tuning: 3)")
    add_flag(
        sgd,
        "--lr-schedule",
        help="piecewise, piecewise-ft, piecewise-A-B-..., superconverge (piecewise-70-10; fine-tuning: piecewise-ft)",
    )
    add_flag(
        sgd,
        "--lr-max",
        type=positive_float,
        help="highest learning rate (0.05; fine-tuning another network than the RN-18: 0.01)",
    )
    add_flag(
        sgd,
        "--weight_decay",
        type=natural_float,
        default=5e-4,
        help="of SGD; from scratch not on biases and norms (%(default)s)",
    )
    add_flag(
        sgd,
        "--lr_no_decay",
        type=positive_float,
        help="constant rate of biases and norms from scratch; 1.0 as published (follows the schedule)",
    )
    add_flag(sgd, "--loss", choices=["ce"], default="ce", help="loss of the update: ce, cross-entropy (%(default)s)")
    add_flag(
        sgd, "--seed", type=natural_int, default=0, help="of weights, order, augmentation and drawn norms (%(default)s)"
    )
    attack = parser.add_argument_group("attack in training")
    add_flag(attack, "--attack", choices=["apgd"], help="train on adversarial points (left out: standard training)")
    add_flag(
        attack,
        "--l_norms",
        type=word_list,
        help="norms, with blanks between; several: one is drawn for each batch, E-AT ('Linf L1')",
    )
    add_flag(
        attack,
        "--l_eps",
        type=float_list,
        help="a radius per norm, in pixels of [0, 1], fractions too (the data set's)",
    )
    add_flag(
        attack, "--at_iter", type=positive_int, default=10, help="steps of the attack, in every norm (%(default)s)"
    )
    add_flag(attack, "--l_iters", type=int_list, help="steps of the attack, one number per norm (--at_iter)")
    test = parser.add_argument_group("evaluation")
    add_flag(
        test,
        "--eval_freq",
        type=natural_int,
        default=0,
        help="every so many epochs, and after the last, APGD-CE, 100 steps, in Linf, L2, L1; 0: never (%(default)s)",
    )
    add_flag(test, "--n_ex_eval", type=positive_int, default=200, help="training and test points for it (%(default)s)")
    add_flag(test, "--final_eval", action="store_true", help="the standard evaluation of eval.py at the end (off)")
    add_flag(test, "--n_ex_final", type=positive_int, help="test points for it (1000, or all if there are fewer)")
    add_flag(
        test,
        "--eval_eps",
        type=float_list,
        help="radii for both, in the order Linf L2 L1 (those trained with, else the data set's)",
    )
    add_flag(test, "--batch_size_eval", type=positive_int, default=250, help="points attacked at once (%(default)s)")
    run = parser.add_argument_group("run")
    add_flag(run, "--save_dir", default="./runs", help="folder in which the run's folder is made (%(default)s)")
    add_flag(
        run,
        "--save_freq",
        type=positive_int,
        help="epochs between checkpoints; the last epoch is always saved (10; fine-tuning: 1)",
    )
    add_flag(run, "--save_optim", action="store_true", help="keep the optimizer's state in checkpoints (off)")
    add_flag(
        run,
        "--amp",
        choices=AMPS,
        default="off",
        help="number format of the passes, also the attack's; fp16: CUDA only, with a gradient scaler (%(default)s: float32)",
    )
    add_flag(run, "--compile", action="store_true", help="compile the network with torch.compile (off)")
    add_flag(run, "--threads", type=positive_int, help="CPU threads (PyTorch's choice: the cores)")
    add_flag(run, "--notes_run", default="", help="a word for the run folder's name (none)")
    add_flag(run, "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s: the best there is)")
    return parser


def resolve(args: Namespace, parser: Parser) -> None:
    """Fill in the published setting of the mode for every flag left out; usage errors for what does not fit together."""
    if args.finetune_model and not args.model_name:
        parser.error("argument --finetune_model: name the network to start from with --model_name")
    if args.model_name and not args.finetune_model:
        parser.error(
            "argument --model_name: add --finetune_model to start from this network (training from scratch takes none)"
        )
    if args.finetune_model and args.width:
        parser.error("argument --width: a network to fine-tune has its own width, leave this flag out")
    if args.finetune_model and args.lr_no_decay:
        parser.error("argument --lr_no_decay: fine-tuning decays all parameters alike, leave this flag out")
    if not args.finetune_model:
        args.act, args.width = args.act or "softplus1", args.width or (16 if args.dataset == "digits" else 64)
    args.epochs = args.epochs or (3 if args.finetune_model else 80)
    args.save_freq = args.save_freq or (1 if args.finetune_model else 10)
    args.lr_schedule = args.lr_schedule or ("piecewise-ft" if args.finetune_model else "piecewise-70-10")
    args.l_norms = args.l_norms or ["Linf", "L1"]
    args.l_iters = args.l_iters or [args.at_iter] * len(args.l_norms)
    with parser.blame("--lr-schedule"):
        lr_schedule(args.lr_schedule, 1.0)
    with parser.blame("--l_norms"):
        threats_for(args.dataset, args.l_norms)
    with parser.blame("--l_eps"):
        args.l_eps = [threat.eps for threat in threats_for(args.dataset, args.l_norms, args.l_eps)]
    if len(args.l_iters) != len(args.l_norms):
        parser.error(
            f"argument --l_iters: one number of steps for each norm is needed, {len(args.l_norms)}; got {len(args.l_iters)}"
        )
    if args.eval_eps is None:
        radii = RADII[args.dataset] | (dict(zip(args.l_norms, args.l_eps, strict=True)) if args.attack else {})
        args.eval_eps = [radii[norm] for norm in NORMS]
    elif len(args.eval_eps) != len(NORMS):
        parser.error(f"argument --eval_eps: three radii are needed, for {' '.join(NORMS)}; got {len(args.eval_eps)}")


def load(args: Namespace, parser: Parser) -> tuple[Dataset, nn.Module, Spec, torch.device]:
    """The objects that the flags name, checked against each other before anything is written."""
    with parser.blame("--device"):
        device = choose_device(args.device)
    with parser.blame("--amp"):
        check_format(device, args.amp)
    set_up(args.threads, tf32=True)
    torch.manual_seed(args.seed)
    if args.finetune_model:
        with parser.blame("--model_name"):
            loaded = load_model(args.model_name, args.model_dir, args.dataset, args.act)
        model, spec = loaded.model, loaded.spec
        args.act, args.width = spec.get("act"), spec.get("width")
    with parser.blame("--data_dir"):
        data = load_dataset(args.dataset, args.data_dir)
    for flag, asked, there in (
        ("--n_ex_train", args.n_ex_train, len(data.train)),
        ("--n_ex_eval", args.n_ex_eval if args.eval_freq else 1, min(len(data.train), len(data.test))),
        ("--n_ex_final", args.n_ex_final, len(data.test)),
    ):
        if asked and asked > there:
            parser.error(f"argument {flag}: {args.dataset} has {there} such points, {asked} were asked for")
    args.n_ex_train, args.n_ex_final = args.n_ex_train or len(data.train), args.n_ex_final or min(1000, len(data.test))
    if not args.finetune_model:
        sizes = {"num_classes": data.num_classes, "in_channels": data.shape[0], "width": args.width, "act": args.act}
        spec = {"arch": "preact-resnet18", **sizes}
        model = build_model(**spec)
    args.lr_max = args.lr_max or (0.05 if spec["arch"] == "preact-resnet18" else 0.01)
    model = model.to(device)
    with parser.blame("--model_name"), eval_mode(model):
        check_fits(model, data.shape, data.num_classes)
    if 1 in (args.batch_size, args.n_ex_train):
        with parser.blame("--batch_size" if args.batch_size == 1 else "--n_ex_train"):
            check_one_point(model, data.shape)
    return data, model, spec, device


def announce(args: Namespace, folder: Path, threats: Sequence[Threat], device: torch.device) -> None:
    """Say and save what is going to happen."""
    write_json(folder / "config.json", vars(args))
    write_json(folder / "env.json", environment(device))
    print("\n".join(f"  {name:<16} {value}" for name, value in vars(args).items()))
    if not args.attack:
        print(
            "\n!!! STANDARD TRAINING: without --attack no adversarial points are made, and the network will not be robust."
        )
        print("!!! For adversarial training give --attack=apgd --l_norms='Linf L1'.\n")
    elif len(threats) > 1:
        print(f"E-AT: for each batch one of {', '.join(map(str, threats))}, drawn by its running error")
    else:
        print(f"adversarial training for {threats[0]}")
    if args.eval_eps != list(RADII[args.dataset].values()):
        print(f"evaluation radii, in the order {' '.join(NORMS)}: {args.eval_eps} (--eval_eps sets them apart)")
    print(f"on {device}; run folder {folder}", flush=True)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the flags say; the run's folder."""
    parser = make_parser()
    args = parser.parse_args(argv)
    resolve(args, parser)
    data, model, spec, device = load(args, parser)
    threats = threats_for(args.dataset, args.l_norms, args.l_eps) if args.attack else []
    attacks = [partial(apgd, threat=threat, n_iter=n) for threat, n in zip(threats, args.l_iters, strict=False)]
    eat = EAT(threats)
    train = on_device(data.train.first(args.n_ex_train), device)
    steps = number_of_batches(len(train), args.batch_size)
    lr_at = lr_schedule(args.lr_schedule, args.lr_max)
    if args.finetune_model:
        groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
    else:
        groups = parameter_groups(model, args.lr_max, args.weight_decay, args.lr_no_decay)
    optimizer = torch.optim.SGD(groups, lr=args.lr_max, momentum=0.9, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    network = in_format(torch.compile(model) if args.compile else model, device, args.amp)
    start = f"from-{Path(args.model_name).name.removesuffix('.pth')}" if args.finetune_model else "from-scratch"
    norms = "-".join(args.l_norms) if args.attack else "no-attack"
    with parser.blame("--save_dir"):
        folder = new_folder(
            args.save_dir, [args.dataset, start, args.attack or "", norms, f"seed{args.seed}", args.notes_run]
        )
    announce(args, folder, threats, device)

    for epoch in range(args.epochs):
        meter = Meter([threat.norm for threat in threats], device)
        model.train()
        bar = tqdm(
            batches(train, args.batch_size, args.seed, epoch, device),
            total=steps,
            desc=f"epoch {epoch + 1}/{args.epochs}",
            leave=False,
        )
        for step, (x, y) in enumerate(bar):
            set_lr(optimizer, lr_at((epoch * steps + step) / (args.epochs * steps)))
            drawn = eat.draw(generator(args.seed, epoch, step)) if threats else 0
            if threats:
                with eval_mode(model), frozen(model):
                    x = attacks[drawn](network, x, y).x_best
            loss, right = update(network, optimizer, scaler, x, y)
            meter.observe(drawn, loss, right)
            if threats:
                eat.observe(drawn, right)
        record = meter.record(epoch + 1, optimizer.param_groups[0]["lr"], eat.errors())
        if not math.isfinite(record["loss"]):
            sys.exit(
                f"train.py: epoch {epoch + 1} diverged, its loss is {record['loss']}: try a lower --lr-max. So far: {folder}"
            )
        last = epoch + 1 == args.epochs
        if args.eval_freq and ((epoch + 1) % args.eval_freq == 0 or last):
            record["eval"] = quick_figures(model, data, args, device)
        append_json_line(folder / "metrics.jsonl", record)
        print(console_line(record, args.epochs), flush=True)
        if last or (epoch + 1) % args.save_freq == 0:
            content = {"spec": spec, "state_dict": model.state_dict(), "epoch": epoch + 1, "dataset": args.dataset}
            content["threats"] = {threat.norm: threat.eps for threat in threats}
            save_whole(
                content | ({"optimizer": optimizer.state_dict()} if args.save_optim else {}),
                folder / f"ep_{epoch + 1}.pth",
            )
    if args.final_eval:
        final_figures(model, data.test.first(args.n_ex_final), args, device, folder)
    print(f"saved {folder / f'ep_{args.epochs}.pth'}")
    return folder


def update(
    network: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of SGD on x (B, C, H, W), y (B,): the mean loss and which were right (B,), before it. Nothing waits for the device."""
    logits = network(x).float()
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), logits.argmax(1) == y


def quick_figures(model: nn.Module, data: Dataset, args: Namespace, device: torch.device) -> dict[str, Any]:
    """Accuracy on the first training and test points under APGD-CE with 100 steps (an upper bound)."""
    splits = {"train": data.train, "test": data.test}
    return {
        name: summarise(attacked(model, split.first(args.n_ex_eval), args, device, Budget("fast")))
        for name, split in splits.items()
    }


def final_figures(model: nn.Module, points: Split, args: Namespace, device: torch.device, folder: Path) -> None:
    """The standard evaluation, printed and saved in the run's folder."""
    start = time.time()
    content = as_json(attacked(model, points, args, device, Budget(), folder))
    about = {"seconds": round(time.time() - start, 1), "settings": vars(args), "environment": environment(device)}
    write_json(folder / "eval.json", content | about)
    print(table(content["accuracy"]), *(f"WARNING: {warning}" for warning in content["warnings"]), sep="\n")


def attacked(
    model: nn.Module, points: Split, args: Namespace, device: torch.device, budget: Budget, folder: Path | None = None
) -> Evaluation:
    """An evaluation in the three norms with the radii of --eval_eps."""
    threats = threats_for(args.dataset, NORMS, args.eval_eps)
    with full_precision(), eval_mode(model), frozen(model):
        return evaluate(
            model,
            Points(points.images, points.labels, points.levels),
            threats,
            device,
            budget,
            args.batch_size_eval,
            args.seed,
            folder,
        )


if __name__ == "__main__":
    main()
