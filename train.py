"""Adversarial training for several Lp norms (E-AT, arXiv 2105.12508), and fine-tuning of any network to them.

python train.py --attack=apgd --l_norms='Linf L1'                                    E-AT from scratch
python train.py --attack=apgd --l_norms=L2 --l_eps=0.5 --at_iter=10                  one norm
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --lr-schedule=piecewise-ft --model_name=pretr_Linf.pth
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --model_name=RB_Engstrom2019Robustness
python train.py --dataset=digits --attack=apgd --l_norms='Linf L1' --final_eval      on a laptop, in minutes
python train.py --resume=runs/RUN                                                    go on with a run that was ended
torchrun --nproc_per_node=8 train.py --attack=apgd --l_norms='Linf L1' --resume      on 8 GPUs; goes on if it was ended

Without --attack the training is standard: no adversarial points.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.apgd import Model
from attacks.evaluator import Examples
from attacks.multinorm import ALL_NORMS, SCHEMES, AdversarialBatch, Scheme, make_scheme
from attacks.norms import NORMS
from attacks.plan import AttackPlan
from attacks.results import Evaluation
from attacks.threat import RADII, threats_for
from data import (
    DATASETS,
    Dataset,
    FolderSplit,
    Split,
    batches,
    load_dataset,
    load_extra,
    mix,
    number_of_batches,
    on_device,
)
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.statistics import evaluation_json
from models import Spec, build_model
from models.preact_resnet import ACTIVATIONS
from models.pretrained import check_fits, check_one_point, load_model, rebuild
from models.robustbench_zoo import published_preparation
from training.gradient_projection import GradientProjection
from training.metrics import EpochMetrics, NonFiniteGuard, console_line, per_threat_sums
from training.optim import averaged, lr_schedule, parameter_groups, set_lr
from utils.checkpoint import load_tensors, save_atomic
from utils.cli import (
    Parser,
    add_flag,
    float_list,
    int_list,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    share_of_one,
    word_list,
)
from utils.distributed import (
    all_reduce_sum,
    average_buffers,
    barrier,
    choose_device,
    data_parallel,
    local_device,
    no_sync_unless,
    processes,
    run_on_rank0,
    sync_batchnorm,
)
from utils.modules import eval_mode, generator, no_param_grad
from utils.precision import AMPS, autocast_model, check_amp, full_precision, set_up_torch
from utils.resume import (
    ANY_RUN,
    ResumePoint,
    check_same,
    cut_metrics,
    lock_run,
    note_resumed,
    run_before,
    with_saved_command,
)
from utils.run_folder import append_json_line, emptied, environment, flat, new_folder, table, write_json
from utils.signals import Interrupted, Signals
from utils.state import CheckpointManager, NonFiniteError, Stateful, check_finite, state_files

# What may be another when a run goes on: the weights don't depend on it (on device and threads by rounding alone).
FREE = {
    "resume",
    "data_dir",
    "model_dir",
    "workers",
    "eval_freq",
    "n_ex_eval",
    "final_eval",
    "n_ex_final",
    "batch_size_eval",
    "save_dir",
    "save_freq",
    "save_every",
    "save_optim",
    "tensorboard",
    "threads",
    "device",
}


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
        "--arch",
        help="preact-resnet18 or wide-resnet-DEPTH-WIDTH, as wide-resnet-28-10 (preact-resnet18, or the checkpoint's)",
    )
    add_flag(
        model,
        "--act",
        choices=list(ACTIVATIONS),
        help="activation of either (softplus1, wide-resnet: relu, or the checkpoint's)",
    )
    add_flag(model, "--width", type=positive_int, help="channels of the preact-resnet18's first stage (64; digits: 16)")
    points = parser.add_argument_group("points")
    add_flag(points, "--dataset", choices=DATASETS, default="cifar10", help="data set (%(default)s)")
    add_flag(
        points,
        "--data_dir",
        default="./datasets",
        help="folder that holds or gets cifar-10-batches-py or cifar-100-python, or holds train/ and val/ of images (%(default)s)",
    )
    add_flag(
        points,
        "--image_size",
        type=positive_int,
        help="height and width in pixels to which imagefolder's and imagenet's images are cut (the start network's, else 224)",
    )
    add_flag(points, "--workers", type=positive_int, help="processes that read image files (8, or the cores if fewer)")
    add_flag(points, "--n_ex_train", type=positive_int, help="train on the first so many points (all)")
    add_flag(
        points,
        "--extra_data",
        help="file of more training images for each batch: uncompressed npz with image and label, or Carmon et al.'s pickle (none)",
    )
    add_flag(
        points,
        "--extra_fraction",
        type=share_of_one,
        help="share of each batch that they are; an epoch remains one pass over the data set's own (0.5)",
    )
    add_flag(
        points, "--batch_size", type=positive_int, default=128, help="points an update, of all processes (%(default)s)"
    )
    add_flag(
        points,
        "--accumulate",
        type=positive_int,
        default=1,
        help="pieces into which a process cuts its part of a batch, for less memory (%(default)s)",
    )
    sgd = parser.add_argument_group("optimisation")
    add_flag(
        sgd, "--epochs", type=positive_int, help="passes over the training points (80; fine-tuning: 3, imagenet: 1)"
    )
    add_flag(
        sgd,
        "--lr-schedule",
        help="piecewise, piecewise-ft, piecewise-A-B-..., superconverge (piecewise-70-10; fine-tuning: piecewise-ft)",
    )
    add_flag(
        sgd,
        "--lr-max",
        type=positive_float,
        help="highest learning rate (0.05; fine-tuning another network than the RN-18: 0.01, on imagenet 0.005, XCiT 1e-4)",
    )
    add_flag(
        sgd,
        "--weight_decay",
        type=natural_float,
        help="of SGD; from scratch not on biases and norms (5e-4; fine-tuning on imagenet: 1e-4)",
    )
    add_flag(
        sgd,
        "--lr_no_decay",
        type=positive_float,
        help="constant rate of biases and norms from scratch; 1.0 as published (follows the schedule)",
    )
    add_flag(
        sgd,
        "--grad_clip",
        type=positive_float,
        help="largest L2 norm of an update's gradient, to which longer ones are scaled (no limit)",
    )
    add_flag(
        sgd,
        "--ema",
        type=share_of_one,
        help="also keep averaged weights: this share of the average stays at each update, as 0.999 (off)",
    )
    add_flag(
        sgd,
        "--sync_bn",
        action="store_true",
        help="BatchNorm's statistics over the points of all processes, instead of each process' own (off)",
    )
    add_flag(
        sgd,
        "--loss",
        choices=["ce", "trades"],
        default="ce",
        help="loss of the update: ce, cross-entropy; trades, clean cross-entropy and KL to the adversarial point's (%(default)s)",
    )
    add_flag(sgd, "--trades_beta", type=positive_float, help="weight of trades' KL (6)")
    add_flag(
        sgd,
        "--init_epochs",
        type=natural_int,
        default=0,
        help="so many of --epochs, the first, are standard training (%(default)s)",
    )
    add_flag(
        sgd, "--seed", type=natural_int, default=0, help="of weights, order, augmentation and drawn norms (%(default)s)"
    )
    attack = parser.add_argument_group("attack in training")
    add_flag(attack, "--attack", choices=["apgd"], help="train on adversarial points (left out: standard training)")
    add_flag(
        attack,
        "--l_norms",
        type=word_list,
        help="norms, with blanks between; of several --multinorm says which is met when ('Linf L1'; sat, avg, max, msd: 'Linf L2 L1')",
    )
    add_flag(
        attack,
        "--multinorm",
        choices=list(SCHEMES),
        help="how several norms are trained for: " + "; ".join(f"{k}: {v}" for k, v in SCHEMES.items()) + " (eat)",
    )
    add_flag(attack, "--ramp_lambda", type=natural_float, help="weight of ramp's logit pairing (2; fine-tuning: 0.5)")
    add_flag(
        attack,
        "--gradient_projection",
        action="store_true",
        help="RAMP's: each epoch trains twice, naturally and adversarially, and puts both changes together (off)",
    )
    add_flag(
        attack,
        "--l_eps",
        type=float_list,
        help="a radius per norm, in pixels of [0, 1], fractions too (the data set's)",
    )
    add_flag(
        attack,
        "--at_iter",
        type=positive_int,
        help="steps of the attack, in every norm (10; fine-tuning on imagenet: 5, L1 15)",
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
    add_flag(
        run,
        "--resume",
        nargs="?",
        const=ANY_RUN,
        metavar="RUN",
        help="go on with the run in this folder, its flags are known; without RUN: with this command's newest run, if any (off)",
    )
    add_flag(
        run,
        "--save_every",
        type=positive_float,
        default=15.0,
        help="minutes after which the state is saved within an epoch too, to resume from (%(default)s)",
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
    add_flag(
        run,
        "--tensorboard",
        action="store_true",
        help="also write the metrics for TensorBoard, in RUN/tensorboard (off)",
    )
    add_flag(run, "--notes_run", default="", help="a word for the run folder's name (none)")
    add_flag(run, "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s: the best there is)")
    return parser


def check_together(args: Namespace, parser: Parser) -> None:
    """Usage errors for flags that have no meaning beside the others."""
    scratch, no_attack = not args.finetune_model, not args.attack
    alone = "without an attack it has no meaning, add --attack=apgd"
    for flag, wrong, advice in (
        (
            "finetune_model",
            not scratch and not args.model_name,
            "name the network to start from with --model_name",
        ),
        (
            "model_name",
            scratch and args.model_name,
            "add --finetune_model to start from this network (training from scratch takes none)",
        ),
        ("width", not scratch and args.width, "a network to fine-tune has its own width, leave this flag out"),
        (
            "lr_no_decay",
            not scratch and args.lr_no_decay,
            "fine-tuning decays all parameters alike, leave this flag out",
        ),
        ("multinorm", no_attack and args.multinorm, alone),
        ("gradient_projection", no_attack and args.gradient_projection, alone),
        ("init_epochs", no_attack and args.init_epochs, alone),
        (
            "init_epochs",
            args.init_epochs and args.gradient_projection,
            "with --gradient_projection half of every epoch is standard training, leave this flag out",
        ),
        ("loss", no_attack and args.loss != "ce", alone),
        ("trades_beta", args.trades_beta and args.loss != "trades", "add --loss=trades, whose weight it is"),
        (
            "ramp_lambda",
            args.ramp_lambda is not None and args.multinorm != "ramp",
            "add --multinorm=ramp, whose weight it is",
        ),
        (
            "ema",
            args.ema and args.gradient_projection,
            "with --gradient_projection weights are put together once an epoch, leave this flag out",
        ),
        (
            "tensorboard",
            args.tensorboard and find_spec("tensorboard") is None,
            "the package is missing: pip install tensorboard",
        ),
    ):
        if wrong:
            parser.error(f"argument --{flag}: {advice}")


def resolve(args: Namespace, parser: Parser) -> None:
    """Fill in the published setting of the mode for every flag left out; usage errors for what does not fit together."""
    check_together(args, parser)
    resolve_network(args, parser)
    big = args.finetune_model and args.dataset == "imagenet"  # with the published settings of ImageNet
    args.epochs = args.epochs or (1 if big else 3 if args.finetune_model else 80)
    args.weight_decay = (1e-4 if big else 5e-4) if args.weight_decay is None else args.weight_decay
    args.save_freq = args.save_freq or (1 if args.finetune_model else 10)
    args.lr_schedule = args.lr_schedule or ("piecewise-ft" if args.finetune_model else "piecewise-70-10")
    args.multinorm = args.multinorm or "eat"
    args.l_norms = args.l_norms or (list(NORMS) if args.multinorm in ALL_NORMS else ["Linf", "L1"])
    args.l_iters = args.l_iters or [
        args.at_iter or (10 if not big or args.multinorm == "msd" else 15 if norm == "L1" else 5)
        for norm in args.l_norms
    ]
    args.at_iter = args.at_iter or 10
    args.trades_beta = args.trades_beta or (6.0 if args.loss == "trades" else None)
    if args.multinorm == "ramp" and args.ramp_lambda is None:
        args.ramp_lambda = 0.5 if args.finetune_model else 2.0
    if args.init_epochs > args.epochs:
        parser.error(f"argument --init_epochs: there are {args.epochs} epochs in all")
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
    with parser.blame("--multinorm" if args.loss == "ce" else "--loss"):
        scheme_of(args)
    if args.eval_eps is None:
        radii = RADII[args.dataset] | (dict(zip(args.l_norms, args.l_eps, strict=True)) if args.attack else {})
        args.eval_eps = [radii[norm] for norm in NORMS]
    elif len(args.eval_eps) != len(NORMS):
        parser.error(f"argument --eval_eps: three radii are needed, for {' '.join(NORMS)}; got {len(args.eval_eps)}")


def resolve_network(args: Namespace, parser: Parser) -> None:
    """The same for --arch, --act and --width; the network of --finetune_model has its own."""
    if args.arch:
        with parser.blame("--arch"), torch.device("meta"):
            build_model(args.arch)
    if args.width and args.arch not in (None, "preact-resnet18"):
        parser.error(f"argument --width: {args.arch} says its width itself, leave this flag out")
    if not args.finetune_model:
        args.arch = args.arch or "preact-resnet18"
        preact = args.arch == "preact-resnet18"
        args.act = args.act or ("softplus1" if preact else "relu")
        args.width = args.width or (None if not preact else 16 if args.dataset == "digits" else 64)


def scheme_of(args: Namespace) -> Scheme:
    """Which adversarial points an update sees. Raises ValueError."""
    if not args.attack:
        return Scheme([])
    threats = threats_for(args.dataset, args.l_norms, args.l_eps)
    return make_scheme(args.multinorm, threats, args.l_iters, args.ramp_lambda or 0.0, args.trades_beta)


def load(
    args: Namespace, parser: Parser, device: torch.device, state: dict[str, Any] | None
) -> tuple[Dataset, nn.Module, Spec]:
    """The objects that the flags name, checked against each other before anything is written. A state brings its network."""
    torch.manual_seed(args.seed)
    spec: Spec = {}
    about: dict[str, Any] = state or {}
    if state:
        spec = dict(state["spec"])
        with parser.blame("--resume"):
            model = rebuild(spec, args.model_name)
    elif args.finetune_model:
        with parser.blame("--model_name"):
            loaded = load_model(args.model_name, args.model_dir, args.dataset, args.act, args.arch)
        model, spec, about = loaded.model, loaded.spec, loaded.about
    if args.finetune_model:
        args.arch, args.act, args.width = spec.get("arch"), spec.get("act"), spec.get("width")
    size = args.image_size or about.get("image_size")
    with parser.blame("--data_dir"):
        data = load_dataset(args.dataset, args.data_dir, size or 224, published_preparation(spec, size))
    data = with_extra(args, parser, data)
    of_files = isinstance(data.train, FolderSplit)
    if args.image_size and not of_files:
        parser.error(f"argument --image_size: the images of {args.dataset} have one size, leave this flag out")
    args.image_size = data.shape[1] if of_files else None
    for flag, asked, there in (
        ("--n_ex_train", args.n_ex_train, len(data.train)),
        ("--n_ex_eval", args.n_ex_eval if args.eval_freq else 1, min(len(data.train), len(data.test))),
        ("--n_ex_final", args.n_ex_final, len(data.test)),
    ):
        if asked and asked > there:
            parser.error(f"argument {flag}: {args.dataset} has {there} such points, {asked} were asked for")
    args.n_ex_train, args.n_ex_final = args.n_ex_train or len(data.train), args.n_ex_final or min(1000, len(data.test))
    if not spec:
        spec = {"arch": args.arch, "num_classes": data.num_classes, "in_channels": data.shape[0], "act": args.act}
        spec |= {"width": args.width} if args.width else {}
        model = build_model(**spec)
    if args.finetune_model and args.dataset == "imagenet":
        args.lr_max = args.lr_max or (1e-4 if "xcit" in args.model_name.lower() else 0.005)
    args.lr_max = args.lr_max or (0.01 if args.finetune_model and args.arch != "preact-resnet18" else 0.05)
    model = model.to(device)
    with parser.blame("--model_name"), eval_mode(model):
        check_fits(model, data.shape, data.num_classes)
    if 1 in (args.batch_size, args.n_ex_train):
        with parser.blame("--batch_size" if args.batch_size == 1 else "--n_ex_train"):
            check_one_point(model, data.shape)
    return data, model, spec


def with_extra(args: Namespace, parser: Parser, data: Dataset) -> Dataset:
    """The data set, with the images of --extra_data if there are any; usage errors for what does not fit together."""
    if not args.extra_data:
        if args.extra_fraction:
            parser.error("argument --extra_fraction: name the file of extra images with --extra_data")
        return data
    if args.batch_size == 1:
        parser.error("argument --batch_size: with --extra_data a batch has two points or more, one of each kind")
    with parser.blame("--extra_data"):
        extra = load_extra(args.extra_data, data)
    args.extra_fraction, args.extra_content = args.extra_fraction or 0.5, extra.content
    return replace(data, extra=extra)


def check_parts(args: Namespace, parser: Parser, number: int) -> None:
    """Usage errors if a batch can't be shared out: each piece of each process needs two points (BatchNorm may fail on one)."""
    if number > 1 and args.n_ex_train < 2 * number:
        parser.error(f"argument --n_ex_train: {number} processes need two points each, got {args.n_ex_train}")
    if (number > 1 or args.accumulate > 1) and args.batch_size < 2 * number * args.accumulate:
        parser.error(
            f"argument --batch_size: {number} processes with --accumulate={args.accumulate} need two points for each piece, "
            f"{2 * number * args.accumulate} in all; got {args.batch_size}"
        )


class Run:
    """One run's objects. What an update changes is the network and `parts`, which the checkpoints saves; the next one is (epoch, step)."""

    def __init__(
        self,
        args: Namespace,
        data: Dataset,
        model: nn.Module,
        spec: Spec,
        device: torch.device,
        share: tuple[int, int],
        signals: Signals,
        folder: Path,
    ) -> None:
        self.args, self.data, self.device, self.signals, self.folder = args, data, device, signals, folder
        self.share, self.first = share, share[0] == 0
        self.model = sync_batchnorm(model, device) if args.sync_bn else model
        self.scheme = scheme_of(args)
        self.threats = self.scheme.threats
        self.natural = Scheme(self.threats)
        train = mix(data.train.first(args.n_ex_train), data.extra, args.batch_size, args.extra_fraction)
        self.train = on_device(train, device)
        self.steps = number_of_batches(len(self.train), args.batch_size, share[1])
        self.lr_at = lr_schedule(args.lr_schedule, args.lr_max)
        self.optimizer = sgd(args, self.model, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.watch = NonFiniteGuard([*map(str, self.threats), "clean"])
        self.meter = EpochMetrics([threat.norm for threat in self.threats], device)
        # Of an epoch's two halves the first is natural training then.
        self.halves = 2 if args.gradient_projection else 1
        self.projection = GradientProjection(self.model, sgd(args, self.model, device)) if self.halves == 2 else None
        self.averaged = averaged(self.model, args.ema) if args.ema else None
        compiled: nn.Module = torch.compile(self.model) if args.compile else self.model  # type: ignore[assignment]
        # As the attack sees it, each process on its own.
        self.attacked = self.meter.passes.of(autocast_model(compiled, device, args.amp), learns=False)
        self.parallel = data_parallel(compiled, device)
        self.updated = self.meter.passes.of(autocast_model(self.parallel, device, args.amp), learns=True)
        self.about = {"spec": spec, "dataset": args.dataset, "threats": {t.norm: t.eps for t in self.threats}}
        self.about |= {"image_size": args.image_size} if args.image_size else {}
        parts: dict[str, Stateful] = {
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "errors": self.scheme.errors,
            "meter": self.meter,
        }
        parts |= {"averaged": self.averaged} if self.averaged else {}
        parts |= {"projection": self.projection} if self.projection else {}
        self.checkpoints = CheckpointManager(
            folder, self.model, self.about, parts, 60 * args.save_every, writes=self.first
        )
        self.epoch = self.step = 0

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.checkpoints.restore(state)
        self.epoch, self.step = state["epoch"], state["step"]

    def save(self) -> None:
        """Save the state, once all updates are known to be sound."""
        self.watch.look()
        self.checkpoints.save(self.epoch, self.step)

    def next_epoch(self) -> None:
        """Count an epoch that is over."""
        self.epoch, self.step = self.epoch + 1, 0
        self.meter.reset()

    def begin_half(self, second: bool) -> tuple[Scheme, torch.optim.Optimizer]:
        """Begin or go on with a half of the epoch (there is one only, but for gradient projection): the scheme, and whose momentum."""
        if not self.projection:
            return self.natural if self.epoch < self.args.init_epochs else self.scheme, self.optimizer
        if not self.projection.start:
            self.projection.begin()
        if not second:
            return self.natural, self.projection.optimizer
        if not self.projection.natural:
            self.projection.turn()
        return self.scheme, self.optimizer

    def batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The rest of the half: x and y of this process' part of each batch, and the number of points of the whole batch."""
        args, first = self.args, self.step % self.steps
        found = batches(
            self.train, args.batch_size, args.seed, self.epoch, self.device, first, self.share, args.workers
        )
        bar = tqdm(
            found,
            total=self.steps,
            initial=first,
            desc=f"epoch {self.epoch + 1}/{args.epochs}",
            leave=False,
            disable=not self.first,
        )
        for x, y in bar:
            yield x, y, min(args.batch_size, len(self.train) - self.step % self.steps * args.batch_size)

    def check(self) -> None:
        """Between two updates: raises Interrupted or NonFiniteError, saves the state when that is due. Knows all updates but the last."""
        self.watch.look(all_but=1)
        if self.share[1] == 1:
            self.signals.check()
        elif self.watch.stop:  # all processes know it of the same update
            raise Interrupted(self.signals.received or signal.SIGTERM)
        if self.checkpoints.due():
            self.save()

    def observe(self, sums: Tensor, points: int, points_here: int) -> None:
        """Count an update of so many points, so many of them in this process, where `update` gave these sums."""
        asked = torch.full((1,), float(self.signals.received is not None), device=self.device)
        sums, asked = all_reduce_sum(torch.cat([sums, asked])).split([len(sums), 1])
        table = sums[1:].view(-1, 3)
        what = f"batch {self.step % self.steps + 1} of epoch {self.epoch + 1}"
        self.watch.observe(what, torch.cat([sums[:1], table[:, 0]]), asked[0])
        self.meter.observe(table, points, points_here)
        if self.threats:
            self.scheme.errors.observe(table[:-1, 1:])
        self.step += 1


def sgd(args: Namespace, model: nn.Module, device: torch.device) -> torch.optim.SGD:
    """SGD as the flags say."""
    if args.finetune_model:
        groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
    else:
        groups = parameter_groups(model, args.lr_max, args.weight_decay, args.lr_no_decay)
    return torch.optim.SGD(groups, lr=args.lr_max, momentum=0.9, fused=device.type == "cuda")


def train_epoch(run: Run) -> None:
    """The rest of an epoch's updates."""
    args, model, (rank, number) = run.args, run.model, run.share
    model.train()
    for half in range(run.step // run.steps, run.halves):
        scheme, optimizer = run.begin_half(second=half == 1)
        for x, y, points in run.batches():
            run.check()
            set_lr(optimizer, run.lr_at((run.epoch * run.steps + run.step % run.steps) / (args.epochs * run.steps)))
            drawn = scheme.draw(points, generator(args.seed, run.epoch, run.step)).tensor_split(number)[rank]
            pieces = min(args.accumulate, max(points // (2 * number), 1))
            # A signal may end the attack at once where no other process waits for this one's part of the update.
            with eval_mode(model), no_param_grad(model), run.signals.at_once() if number == 1 else nullcontext():
                parts = zip(*(part.tensor_split(pieces) for part in (x, y, drawn)), strict=True)
                seen = [(scheme.points(run.attacked, *part), part[1]) for part in parts]
            weight = (
                number / points
            )  # gradients are the mean over the processes, of losses all_reduce_sum over their points
            hold = partial(no_sync_unless, run.parallel)
            sums = update(run.updated, optimizer, run.scaler, scheme, seen, weight, args.grad_clip, hold)
            if not args.sync_bn:
                average_buffers(model)
            if run.averaged:
                run.averaged.update_parameters(model)
            run.observe(sums, points, len(x))
    if run.projection and run.projection.start:
        run.projection.end()


def update(
    network: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    scheme: Scheme,
    pieces: Sequence[tuple[AdversarialBatch, Tensor]],
    weight: float | None = None,
    grad_clip: float | None = None,
    hold: Callable[[bool], AbstractContextManager[Any]] = lambda last: nullcontext(),
) -> Tensor:
    """One step of SGD on the scheme's loss at these points of images with labels y (B,), a pass for each piece; before it, in one row,

    the loss' sum and what `log` says of each threat and of clean images: (1 + 3 (threats + 1),).
    weight: of an image's loss (left out: 1 over their number). hold(last): the context of a pass. Nothing waits for the device.
    """
    optimizer.zero_grad()
    weight = 1 / sum(len(y) for _, y in pieces) if weight is None else weight
    sums = []
    for number, (points, y) in enumerate(pieces, 1):
        with hold(number == len(pieces)):
            logits = network(points.x.flatten(0, 1)).float().unflatten(0, points.threat.shape)
            loss = scheme.loss(logits, y).sum()
            scaler.scale(loss * weight).backward()
        logits = logits.detach()
        table = per_threat_sums(logits, y, points.threat, len(scheme.threats) + 1)
        sums.append(torch.cat([loss.detach()[None], table.flatten()]))
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(sums).sum(0)


def close_epoch(run: Run, board: Any) -> None:
    """What comes after an epoch's last update: figures, a line of metrics, a checkpoint, the state."""
    args, done = run.args, run.epoch + 1
    last = done == args.epochs
    run.watch.look()
    record = run.meter.record(done, run.optimizer.param_groups[0]["lr"], run.scheme.errors.all())
    if args.eval_freq and (done % args.eval_freq == 0 or last):
        run.save()
        for name, model in networks(run).items():
            record[f"eval{name}"] = quick_figures(run, model)
    if run.first:
        append_json_line(run.folder / "metrics.jsonl", record)
        print(console_line(record, args.epochs), flush=True)
        if board:
            for name, value in flat(record).items():
                board.add_scalar(name, value, done)
            board.flush()
        if last or done % args.save_freq == 0:
            for name, model in networks(run).items():
                content = run.about | {"state_dict": model.state_dict(), "epoch": done}
                content |= {"optimizer": run.optimizer.state_dict()} if args.save_optim and not name else {}
                check_finite(model)
                save_atomic(content, run.folder / f"ep_{done}{name}.pth")
    run.next_epoch()
    run.save()


def networks(run: Run) -> dict[str, nn.Module]:
    """The trained network and, with --ema, the averaged one, by what is put behind the names of their files."""
    return {"": run.model} | ({"_ema": run.averaged.module} if run.averaged else {})


def announce(run: Run) -> None:
    """Say what is going to happen."""
    args, number = run.args, run.share[1]
    print("\n".join(f"  {name:<16} {value}" for name, value in vars(args).items()))
    if not args.attack:
        print(
            "\n!!! STANDARD TRAINING: without --attack no adversarial points are made, and the network will not be robust."
        )
        print("!!! For adversarial training give --attack=apgd --l_norms='Linf L1'.\n")
    elif len(run.threats) > 1:
        print(f"{args.multinorm} for {', '.join(map(str, run.threats))}: {SCHEMES[args.multinorm]}")
    else:
        print(f"adversarial training for {run.threats[0]}")
    if args.eval_eps != list(RADII[args.dataset].values()):
        print(f"evaluation radii, in the order {' '.join(NORMS)}: {args.eval_eps} (--eval_eps sets them apart)")
    together = f"{number} processes, the first " if number > 1 else ""
    if run.epoch or run.step:
        print(f"going on after batch {run.step} of {run.halves * run.steps} of epoch {run.epoch + 1}")
    print(f"{together}on {run.device}; run folder {run.folder}", flush=True)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the flags say; the run's folder."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    args = with_saved_command(parser, argv)
    asked = Namespace(**vars(args))
    resolve(args, parser)
    with parser.blame("--device"):
        device = local_device(choose_device(args.device))
    with parser.blame("--amp"):
        check_amp(device, args.amp)
    set_up_torch(args.threads, tf32=True)
    with ExitStack() as held:
        share = held.enter_context(processes(device))
        signals = held.enter_context(Signals())
        with parser.blame("--resume"):
            before = run_on_rank0(lambda: run_before(parser, asked, FREE, held))
        if before and not before.state and (before.folder / f"ep_{args.epochs}.pth").exists():
            print(f"{before.folder} is complete")
            return before.folder
        state = load_tensors(before.state) if before and before.state else None
        data, model, spec = load(args, parser, device, state)
        check_parts(args, parser, share[1])
        env = environment(device, argv) | {"processes": share[1]}
        with parser.blame("--resume" if before else "--save_dir"):
            folder = run_on_rank0(lambda: open_folder(args, before, state["epoch"] if state else 0, env, held))
        run = Run(args, data, model, spec, device, share, signals, folder)
        if state:
            run.restore(state)
        if run.first:
            announce(run)
        train(run)
    return folder


def open_folder(args: Namespace, before: ResumePoint | None, epochs: int, env: dict[str, Any], held: ExitStack) -> Path:
    """A new folder with what was asked, or that of the run before, cut back to so many epochs. Raises ValueError or OSError."""
    if before:
        check_same(before.folder, vars(args), FREE | {"extra_data"})  # a file may move, extra_content knows it
        cut_metrics(before.folder / "metrics.jsonl", epochs)
        if other := note_resumed(before.folder, env):
            print(f"the run was started with another {', '.join(other)}: weights may differ from an undisturbed run's")
        return before.folder
    start = f"from-{Path(args.model_name).name.removesuffix('.pth')}" if args.finetune_model else "from-scratch"
    norms = "-".join(args.l_norms) if args.attack else "no-attack"
    scheme = args.multinorm if args.multinorm != "eat" else ""
    parts = [args.dataset, start, args.attack or "", scheme, norms, f"seed{args.seed}", args.notes_run]
    folder = new_folder(args.save_dir, parts)
    held.enter_context(lock_run(folder, seconds=0))
    write_json(folder / "env.json", env)
    write_json(folder / "config.json", vars(args))
    return folder


def train(run: Run) -> None:
    """All that is left of the run; exits with 143 or 130 after SIGTERM or SIGINT, with 1 and a line that says why if it can't go on."""
    args = run.args
    how = f"go on with: {'torchrun ... ' if run.share[1] > 1 else 'python '}train.py --resume={run.folder}"
    try:
        if run.epoch == run.step == 0:
            run.save()  # there is a state from the start
        try:
            train_to_the_end(run)
        except Interrupted:
            run.save()
            barrier()
            raise
    except Interrupted as end:
        if run.first:
            print(f"{end}: the state after batch {run.step} of epoch {run.epoch + 1} is saved; {how}", flush=True)
        sys.exit(end.code)
    except NonFiniteError as error:
        sys.exit(f"train.py: {error}; {last_state(run)}. Try a lower --lr-max, or --grad_clip")
    except OSError as error:
        sys.exit(f"train.py: {error}; {last_state(run)}; with room on the disk {how}")
    except RuntimeError:
        if run.share[1] > 1:  # most often: another process ended
            print(f"train.py: {last_state(run)}; {how}", file=sys.stderr)
        raise
    if run.first:
        print(f"saved {run.folder / f'ep_{args.epochs}.pth'}")


def train_to_the_end(run: Run) -> None:
    """The epochs that are left and the final evaluation; then no state is needed."""
    board = tensorboard(run) if run.args.tensorboard and run.first else None
    while run.epoch < run.args.epochs:
        train_epoch(run)
        close_epoch(run, board)
    if run.args.final_eval:
        for name, model in networks(run).items():
            final_figures(run, model, name)
    run.checkpoints.forget()


def last_state(run: Run) -> str:
    """Where the last good state is, in words."""
    states = state_files(run.folder)
    return f"the last good state is {states[-1]}" if states else f"no state was saved in {run.folder}"


def tensorboard(run: Run) -> Any:
    """A writer into the run's folder; what it holds of the epochs to come is left out when it is shown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.epoch + 1)


def quick_figures(run: Run, model: nn.Module) -> dict[str, Any]:
    """Accuracy on the first training and test points under APGD-CE with 100 steps (an upper bound)."""
    figures = {}
    for name, split in {"train": run.data.train, "test": run.data.test}.items():
        # Several processes meet in a folder of their own, which is gone after.
        folder = run_on_rank0(lambda: emptied(run.folder / "eval")) if run.share[1] > 1 else None
        plan = AttackPlan("fast", seed=run.args.seed)
        figures[name] = attacked(run, model, split.first(run.args.n_ex_eval), plan, folder).accuracies()
        barrier()
        if folder and run.first:
            shutil.rmtree(folder)
    return figures


def final_figures(run: Run, model: nn.Module, name: str) -> None:
    """The standard evaluation, printed and saved in the run's folder; what an earlier process of the run has done of it is kept."""
    start = time.time()
    folder = run.folder / name.removeprefix("_")
    run_on_rank0(lambda: folder.mkdir(exist_ok=True))
    result = attacked(run, model, run.data.test.first(run.args.n_ex_final), AttackPlan(seed=run.args.seed), folder)
    if run.first:
        about = {"seconds": round(time.time() - start, 1), "settings": vars(run.args)}
        content = evaluation_json(result) | about | {"environment": environment(run.device)}
        write_json(run.folder / f"eval{name}.json", content)
        title = f"averaged, {run.args.ema}" if name else ""
        print(table(content["accuracy"], title), *(f"WARNING: {warning}" for warning in content["warnings"]), sep="\n")


def attacked(
    run: Run, model: nn.Module, split: Split | FolderSplit, plan: AttackPlan, folder: Path | None
) -> Evaluation:
    """An evaluation in the three norms with the radii of --eval_eps, its points shared out over the processes."""
    args, read = run.args, split.in_memory()
    examples = Examples(read.images, read.labels, read.levels)
    options = EvaluationOptions(run.device, args.batch_size_eval, rank=run.share[0], world_size=run.share[1])
    threats = threats_for(args.dataset, list(NORMS), args.eval_eps)
    with full_precision(), eval_mode(model), no_param_grad(model), run.signals.at_once():
        return evaluate(model, examples, threats, plan, options, folder)


if __name__ == "__main__":
    main()
