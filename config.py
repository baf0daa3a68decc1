"""Every flag of train.py and eval.py, once: a field of a frozen configuration; the rules between flags; the published settings.

A field reads: group in --help, default, help, type. `None` stands for a setting that depends on other flags: `resolved` fills in what
the paper used (tables below), `completed` what is known only when the network and the data set are loaded.
"""

from __future__ import annotations

import json
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from attacks.multinorm import SCHEMES, Option, Scheme, make_scheme
from attacks.norms import NORMS
from attacks.results import ATTACKS, AttackPlan
from attacks.threat import Threat, threats
from data import DATASETS, Dataset, FolderSplit
from models import ACTIVATIONS, Spec, find_network
from models.downloads import without_digest
from models.from_file import NetworkFlags
from models.libraries import split_library
from models.networks import FINETUNE_LR, check_arch, describe_networks
from models.normalization import NORMALIZATIONS, Statistic, statistics
from models.own_function import split_own_function
from utils.cli import (
    Parser,
    UsageError,
    add_fields,
    add_flag,
    between,
    blame,
    flag,
    fraction,
    inside,
    kind_of,
    name_or,
    non_negative_float,
    positive_int,
    text_or_nothing,
    words,
)
from utils.image_files import CLASS_ORDERS, ClassOrder
from utils.optimizers import OPTIMIZERS, OWN_FLAGS
from utils.precision import AMPS, Amp
from utils.schedules import lr_schedule
from utils.text import printable

_net, _data, _opt = partial(flag, "network"), partial(flag, "data"), partial(flag, "optimization")
_attack, _eval, _run = partial(flag, "attack"), partial(flag, "evaluation"), partial(flag, "run")
GROUPS = ("network", "data", "optimization", "attack", "evaluation", "run")  # of --help
# Limits that several flags have: what any machine or paper needs, with room; beyond them a number is a slip. PyTorch seeds with 63 bits;
# rates end where float32 does: what diverges is the training's to say.
_batch, _epochs, _often, _rate = between(1, 10**6), between(1, 10**6), between(0, 10**6), inside(0.0, 3.4e38)
_radii, _steps, _runs, _seed = (
    inside(0.0, 1e9, several=True),
    between(1, 10_000),
    between(0, 1000),
    between(0, 2**63 - 1),
)
_mean = name_or(tuple(NORMALIZATIONS), between(-1e6, 1e6, several=True))
_std = name_or(tuple(NORMALIZATIONS), inside(0.0, 1e6, several=True))
Curves = Mapping[str, tuple[float, ...]]  # radii by norm; none: multiples of the evaluation's
LATEST = ""  # what --resume alone stands for: the newest run of this command


def curves(text: str) -> Curves:
    """argparse's type of --curve: radii by norm, those without one under ""; {} for the flag alone."""
    parts = [word.rpartition(":") for word in words(text)] if text else []
    found: dict[str, tuple[float, ...]] = {}
    for norm, _, radii in parts:
        found[norm] = found.get(norm, ()) + _radii(radii.replace(",", " ") if norm else radii)
    return found


def summaries() -> str:
    """What follows the flags in --help: a line for each scheme."""
    width = max(map(len, SCHEMES))
    return "\n".join(["schemes:", *(f"  {name:<{width}}  {scheme.summary}" for name, scheme in SCHEMES.items())])


def networks() -> str:
    """Help of --arch."""
    return f"{describe_networks()} (preact-resnet18, or the checkpoint's)"


# fmt: off
@dataclass(frozen=True)
class Config:
    """Flags of both scripts."""

    act: str | None = _net(None, "activation (the network's own: preact-resnet18 softplus1, wide-resnet relu; or the checkpoint's)", choices=ACTIVATIONS)
    mean: Statistic = _net(None, "mean of each channel, which the network subtracts from images in [0, 1]: numbers, cifar10, cifar100 or imagenet (none, or the checkpoint's)", _mean)  # noqa: RUF009
    std: Statistic = _net(None, "standard deviation of each channel, by which it then divides; likewise (that of --mean's name)", _std)  # noqa: RUF009
    weights: str | None = _net(None, "of several networks' weights in a file those under a name with this word, such as ema (state_dict, model, ...)")
    model_dir: str = _net("./pretrained", "folder with, or for the download of, pretr_*, RB_*, https: and hf: checkpoints (=)", resumable=True)
    data_dir: str = _data("./datasets", "folder with, or for the download of, CIFAR; for imagenet and imagefolder the one with train/ and val/ (=)", resumable=True)
    image_size: int | None = _data(None, "imagenet and imagefolder: height and width of the cropped images, in pixels (the network's, else 224)", between(1, 4096))
    class_order: ClassOrder = _data("name", "imagenet and imagefolder: classes by the name of their folders, 0 1 10 2, or as numbers: name, numeric (=)", choices=CLASS_ORDERS)  # noqa: RUF009
    l_eps: tuple[float, ...] | None = _attack(None, "radius for each norm, for pixels in [0, 1], fractions allowed: '8/255 12' (the data set's)", _radii)
    batch_size_eval: int = _eval(250, "images attacked at once in an evaluation (=)", _batch, resumable=True)
    amp: Amp = _run("off", "bf16 or fp16 (CUDA only): forward passes under autocast; eval.py verifies adversarial examples in float32 (=: float32)", choices=AMPS)  # noqa: RUF009
    seed: int = _run(0, "random seed of initial weights, shuffling, augmentation and sampled norms; in eval.py of the random starts (=)", _seed)
    threads: int | None = _run(None, "CPU threads (PyTorch's choice: the cores)", between(1, 1024), resumable=True)
    device: str = _run("auto", "auto, cpu, cuda, cuda:N or mps (=: the best there is)", resumable=True)


    def network_flags(self) -> NetworkFlags:
        """What they say of a network."""
        size, dataset = self.image_size, getattr(self, "dataset", None)
        shape = (3, size, size) if size else DATASETS[dataset].shape if dataset else None
        return NetworkFlags(getattr(self, "arch", None), self.act, self.mean, self.std, self.weights, shape)


@dataclass(frozen=True)
class TrainConfig(Config):
    """Flags of train.py."""

    finetune_model: bool = _net(False, "start from --model_name instead of random weights (off)")
    model_name: str | None = _net(None, "network to fine-tune: a checkpoint, https://... or hf:USER/REPO/FILE (both also with #sha256=HEX), pretr_{Linf,L2,L1}.pth, RB_{id}[_{Linf,L2}], timm:NAME, torchvision:NAME or FILE.py:FUNCTION, all three also with @CHECKPOINT (none)")
    arch: str | None = _net(None, networks)
    width: int | None = _net(None, "channels of the first stage, for networks whose name does not tell it (64; digits: 16)", between(1, 1024))

    head: str | None = _net(None, "fine-tuning: put a new last layer with random weights in the place of this one, or of the one that is found: auto (auto if the data set has other classes)")
    dataset: str = _data("cifar10", "data set (=)", choices=DATASETS)
    workers: int | None = _data(None, "processes that read image files (8, or the cores if fewer)", between(1, 256), resumable=True)
    check_images: bool = _data(False, "read every image file before training: one that can't be read is found now, not in hours (off)", resumable=True)
    n_ex_train: int | None = _data(None, "train on the first N examples (all)", positive_int)
    n_ex_val: int | None = _data(None, "keep the last N training images out of training; --eval_freq evaluates on them too (none)", positive_int)
    extra_data: str | None = _data(None, "more training images: uncompressed npz with image and label, or Carmon et al.'s pickle (none)", resumable="same content")
    extra_fraction: float | None = _data(None, "fraction of each mini-batch that is --extra_data; an epoch stays one pass over the data set's own images (0.5)", fraction)
    batch_size: int = _data(128, "mini-batch size, over all processes (=)", _batch)
    accumulate: int = _data(1, "gradient-accumulation steps per batch, for less memory (=)", _batch)

    epochs: int | None = _opt(None, "passes over the training set (80; fine-tuning: 3, imagenet: 1)", _epochs)
    head_lr: float | None = _opt(None, "learning rate of a new last layer, in multiples of the others' (1)", inside(0.0, 1e6))
    layer_decay: float | None = _opt(None, "fine-tuning networks of timm: each layer's learning rate is this fraction of the next one's, such as 0.75 (1)", fraction)
    freeze_epochs: int = _opt(0, "train a new last layer alone in the first N of the --epochs (=)", _often)
    optimizer: str = _opt("sgd", "sgd or adamw (=)", choices=OPTIMIZERS)
    momentum: float | None = _opt(None, "of SGD (0.9)", between(0.0, 1.0))
    nesterov: bool = _opt(False, "SGD with Nesterov's momentum (off)")
    betas: tuple[float, ...] | None = _opt(None, "of AdamW, two numbers ('0.9 0.999')", between(0.0, 1.0, several=True))
    lr_schedule: str | None = _opt(None, "piecewise, piecewise-ft, piecewise-A-B-..., superconverge, cosine, linear (piecewise-70-10; fine-tuning: piecewise-ft)", dashed=True)
    lr_max: float | None = _opt(None, "peak learning rate (0.05; fine-tuning: preact-resnet18 0.05, others 0.01, on imagenet 0.005, XCiT 1e-4; adamw: 1e-3, fine-tuning 1e-4)", _rate, dashed=True)
    warmup: float = _opt(0.0, "epochs in which the learning rate rises from 0 to the schedule's (=)", between(0.0, 1e6))
    weight_decay: float | None = _opt(None, "from scratch not on biases and norm layers (5e-4; fine-tuning on imagenet: 1e-4; adamw: 0.05)", between(0.0, 3.4e38))
    lr_no_decay: float | None = _opt(None, "from scratch: constant learning rate of biases and norm layers, 1.0 in the authors' code (follows the schedule)", _rate)
    grad_clip: float | None = _opt(None, "clip the gradient to this L2 norm (no limit)", inside(0.0, 1e9))
    ema: float | None = _opt(None, "also keep an exponential moving average of the weights, with this decay, such as 0.999 (off)", fraction)
    sync_bn: bool = _opt(False, "BatchNorm statistics over all processes, as SyncBatchNorm (off)")
    awp: float | None = _opt(None, "adversarial weight perturbation: the step's gradient is taken where weights are moved by this share of their norm, such as 0.005 (off)", inside(0.0, 1.0))
    label_smoothing: float = _opt(0.0, "of the training loss' cross-entropy, not of the attack's (=)", between(0.0, 1.0))
    loss: str = _opt("ce", "ce: cross-entropy; trades: clean cross-entropy and KL divergence to the adversarial output (=)", choices=["ce", "trades"])
    trades_beta: float | None = _opt(None, "weight of TRADES' KL divergence (6)", inside(0.0, 1e6))
    init_epochs: int = _opt(0, "standard training in the first N of the --epochs (=)", _often)

    attack: str | None = _attack(None, "train on adversarial examples of APGD (left out: standard training)", choices=["apgd"])
    l_norms: tuple[str, ...] | None = _attack(None, "norms to train for, with blanks between ('Linf L1'; sat, avg, max, msd: 'Linf L2 L1')", words)
    multinorm: str | None = _attack(None, "scheme for several norms, as listed below (eat)", choices=SCHEMES)
    gradient_projection: bool = _attack(False, "RAMP's: each epoch is a pass of standard and a pass of adversarial training, whose updates are combined (off)")
    eps_warmup: float | None = _attack(None, "radii grow from 0 over this first share of the training (they are full from the start)", inside(0.0, 1.0))
    at_iter: int | None = _attack(None, "attack steps, in every norm (10; fine-tuning on imagenet: 5, L1 15)", _steps)
    l_iters: tuple[int, ...] | None = _attack(None, "attack steps, one number per norm; goes before --at_iter (--at_iter)", between(1, 10_000, several=True))
    scheme_options: Mapping[str, float] = field(default_factory=dict)  # from the flags of SCHEMES' options

    eval_freq: int = _eval(0, "evaluate as eval.py --attacks=quick does, every N epochs and after the last; 0: never (=)", _often, resumable=True)
    select: str | None = _eval(None, "keep the network of the best such accuracy on --n_ex_val as best.pth: union, average, clean or a norm (none)")
    n_ex_eval: int = _eval(200, "training images, and test images, of --eval_freq (=)", positive_int, resumable=True)
    final_eval: bool = _eval(False, "the standard evaluation of eval.py at the end, with --select of best.pth (off)", resumable=True)
    n_ex_final: int | None = _eval(None, "test images of --final_eval (1000, or all if there are fewer)", positive_int, resumable=True)
    eval_norms: tuple[str, ...] = _eval(tuple(NORMS), "norms of --eval_freq and --final_eval (=)", words)
    eval_eps: tuple[float, ...] | None = _eval(None, "radius for each of --eval_norms (those of training, else the data set's)", _radii)

    save_dir: str = _run("./runs", "folder in which the run's folder is made (=)", resumable=True)
    save_freq: int | None = _run(None, "epochs between checkpoints; the last is always saved (10; fine-tuning: 1)", _epochs, resumable=True)
    resume: str | None = _run(None, "resume the run in this folder, whose other flags need not be given; without RUN: this command's newest run, if any (off)", text_or_nothing, nargs="?", const=LATEST, metavar="RUN", resumable=True)
    save_every: float = _run(15.0, "minutes between saves of the training state within an epoch (=)", inside(0.0, 1e6), resumable=True)
    save_optim: bool = _run(False, "keep the optimizer's state in checkpoints (off)", resumable=True)
    export: str | None = _run(None, "at the end write the network (best.pth with --select, without EMA) to FILE.safetensors, and README.md, a model card, beside it (none)", metavar="FILE.safetensors", resumable=True)
    compile: bool = _run(False, "compile the network with torch.compile (off)")
    no_cuda_graphs: bool = _run(False, "launch each of an attack's kernels by itself; on CUDA an attack is one CUDA graph (off)", resumable=True)
    tensorboard: bool = _run(False, "also write the metrics for TensorBoard, in RUN/tensorboard (off)", resumable=True)
    notes_run: str = _run("", "a word for the run folder's name (none)", text_or_nothing)


@dataclass(frozen=True)
class EvalConfig(Config):
    """Flags of eval.py."""

    model_name: str | None = _net(None, "checkpoint, https://... or hf:USER/REPO/FILE (both also with #sha256=HEX), pretr_{Linf,L2,L1}.pth, RB_{id}[_{Linf,L2}], timm:NAME, torchvision:NAME or FILE.py:FUNCTION, all three also with @CHECKPOINT (needed)")
    dataset: str | None = _data(None, "data set (the one the checkpoint was trained on, else cifar10)", choices=DATASETS)
    n_ex: int | None = _data(None, "evaluate the first N test images (1000, or all if there are fewer)", positive_int)
    l_norms: tuple[str, ...] = _attack(tuple(NORMS), "norms to attack in, with blanks between (=)", words)
    attacks: str = _attack("standard", "standard: APGD-CE, APGD-T (L1: a brief run first); quick: the same, hopeless runs dropped; fast: one APGD-CE; autoattack: standard, FAB-T, Square (=)", choices=ATTACKS)
    effort: int | None = _attack(None, "quick: from 1, little, to 10, at which nothing is dropped; more never gives a higher accuracy (3)", between(1, 10))
    n_iter: int = _attack(100, "steps of each APGD run; L1 is attacked in three stages (=)", between(4, 10**5))
    n_restarts: int | None = _attack(None, "runs of APGD-CE in each norm (Linf, L2: 1, L1: 5)", between(1, 1000))
    n_targets: int | None = _attack(None, "runs of APGD-T in each norm (Linf, L2: 9, L1: 5; fast: 0)", _runs)
    union_only: bool = _attack(False, "accuracy in the union alone: an example broken in one norm is not attacked in the others (off)")
    curve: Curves | None = _attack(None, "also accuracy at other radii, one APGD-CE each: '0.01 0.02' in one norm, 'Linf:2/255,4/255 L1:6,18' in several; without RADII from 0 to 2 eps (off)", curves, nargs="?", const="", metavar="RADII")  # noqa: RUF009
    only_clean: bool = _attack(False, "no attack, clean accuracy alone (off)")
    save_dir: str = _run("./results", "folder in which the result's folder is made (=)")
    resume: bool = _run(False, "resume the same command's newest evaluation, if there is one (off)")
    baseline: str | None = _run(None, "another evaluation's eval.json: paired differences to it, on the same images (none)")
    save_adv: str = _run("npy", "adversarial images, a file per norm: npy, an array; pt: also a dictionary that torch.load reads, with labels and which images were broken (=)", choices=["npy", "pt"])
    robustbench_json: bool = _run(False, "also what RobustBench asks of a network: model_info's fields and the text of an issue, a file of each per norm (off)")


    def folder(self) -> tuple[str, list[str], bool]:
        """Where the result's folder is, the parts of its name, once data set and number of images are known, and --resume."""
        name = Path(without_digest(self.model_name or "")).parts[-2:]
        return self.save_dir, ["eval", self.dataset or "", *name, f"n{self.n_ex}"], self.resume
# fmt: on

AnyConfig = TypeVar("AnyConfig", TrainConfig, EvalConfig)
Rules = Sequence[tuple[str, Callable[[Any], Any], str]]
NO_ATTACK = "without an attack it has no meaning, add --attack=apgd"

# fmt: off
TRAIN_RULES: Rules = (  # flag, when it is wrong, what to do
    ("finetune_model", lambda c: c.finetune_model and not c.model_name, "name the network to start from with --model_name"),
    ("model_name", lambda c: not c.finetune_model and c.model_name, "add --finetune_model to start from this network (training from scratch takes none)"),
    ("weights", lambda c: not c.finetune_model and c.weights, "it says which weights to start from, add --finetune_model and --model_name"),
    ("width", lambda c: c.finetune_model and c.width, "a network to fine-tune has its own width, leave this flag out"),
    ("head", lambda c: not c.finetune_model and c.head, "from scratch every layer is new, leave this flag out"),
    ("head_lr", lambda c: not c.finetune_model and c.head_lr, "from scratch every layer is new, leave this flag out"),
    ("layer_decay", lambda c: not c.finetune_model and c.layer_decay, "from scratch every layer is new, leave this flag out"),
    ("freeze_epochs", lambda c: not c.finetune_model and c.freeze_epochs, "from scratch every layer is new, leave this flag out"),
    ("freeze_epochs", lambda c: c.freeze_epochs and c.gradient_projection, "it does not go with --gradient_projection, leave one of them out"),
    ("lr_no_decay", lambda c: c.finetune_model and c.lr_no_decay, "fine-tuning decays all parameters alike, leave this flag out"),
    ("multinorm", lambda c: not c.attack and c.multinorm, NO_ATTACK),
    ("gradient_projection", lambda c: not c.attack and c.gradient_projection, NO_ATTACK),
    ("init_epochs", lambda c: not c.attack and c.init_epochs, NO_ATTACK),
    ("loss", lambda c: not c.attack and c.loss != "ce", NO_ATTACK),
    ("eps_warmup", lambda c: not c.attack and c.eps_warmup, NO_ATTACK),
    ("init_epochs", lambda c: c.init_epochs and c.gradient_projection, "with --gradient_projection half of every epoch is standard training, leave this flag out"),
    ("betas", lambda c: c.betas and (len(c.betas) != 2 or max(c.betas) == 1), "two numbers below 1 are needed, such as '0.9 0.999'"),
    ("nesterov", lambda c: c.nesterov and c.momentum == 0, "it needs a momentum above 0"),
    ("trades_beta", lambda c: c.trades_beta and c.loss != "trades", "it is the weight in TRADES' loss, add --loss=trades"),
    ("ema", lambda c: c.ema and c.gradient_projection, "with --gradient_projection weights are combined once an epoch, leave this flag out"),
    ("tensorboard", lambda c: c.tensorboard and find_spec("tensorboard") is None, "the package is missing: pip install tensorboard"),
    ("extra_fraction", lambda c: c.extra_fraction and not c.extra_data, "name the file of extra images with --extra_data"),
    ("select", lambda c: c.select and not c.n_ex_val, "say how many training images to keep out for it with --n_ex_val"),
    ("n_ex_val", lambda c: c.n_ex_val and not c.eval_freq, "nothing would look at these images; say how often to with --eval_freq"),
    ("select", lambda c: c.select and c.select not in ("union", "average", "clean", *c.eval_norms), "choose union, average, clean or one of --eval_norms"),
    ("batch_size", lambda c: c.extra_data and c.batch_size == 1, "with --extra_data a batch has two images or more, one of each kind"),
)
EVAL_RULES: Rules = (
    ("model_name", lambda c: not c.model_name, "name the network to evaluate, such as --model_name=runs/RUN/ep_80.pth"),
    ("robustbench_json", lambda c: c.robustbench_json and (c.union_only or c.only_clean), "it needs each norm's accuracy; leave --union_only and --only_clean out"),
    ("save_adv", lambda c: c.save_adv == "pt" and c.only_clean, "without an attack there are no adversarial images, leave one of the two flags out"),
    ("effort", lambda c: c.effort and c.attacks != "quick", "it is the dial of --attacks=quick, add that"),
    ("curve", lambda c: c.curve is not None and (c.union_only or c.only_clean), "it needs each norm's accuracy; leave --union_only and --only_clean out"),
)
# fmt: on

# Defaults: settings of arXiv 2105.12508 (save_freq is ours).
PUBLISHED: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 80, "lr_schedule": "piecewise-70-10", "weight_decay": 5e-4, "save_freq": 10},
    "fine-tuning": {"epochs": 3, "lr_schedule": "piecewise-ft", "weight_decay": 5e-4, "save_freq": 1},
    "fine-tuning on imagenet": {"epochs": 1, "lr_schedule": "piecewise-ft", "weight_decay": 1e-4, "save_freq": 1},
}
STEPS = {"fine-tuning on imagenet": {"Linf": 5, "L2": 5, "L1": 15}}  # of the attack; elsewhere 10


def mode_of(config: TrainConfig) -> str:
    """The key in PUBLISHED."""
    if not config.finetune_model:
        return "from scratch"
    return "fine-tuning on imagenet" if config.dataset == "imagenet" else "fine-tuning"


def check(config: Any, rules: Rules) -> None:
    """Raises UsageError for the first rule that is broken, and for an input normalisation that is none."""
    for name, wrong, advice in rules:
        if wrong(config):
            raise UsageError(f"--{name}", advice)
    with blame("--mean"):
        statistics(config.mean, config.std)


def filled(config: AnyConfig, settings: Mapping[str, Any]) -> AnyConfig:
    """The configuration with its None fields set from `settings`."""
    return replace(config, **{name: value for name, value in settings.items() if getattr(config, name) is None})


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with the published setting for each flag left out. Raises UsageError for flags that don't fit together."""
    check(config, TRAIN_RULES)
    usual = {"weight_decay": OPTIMIZERS[config.optimizer].weight_decay}
    config = _with_optimizer(filled(_with_network(config), usual))
    config = filled(config, PUBLISHED[mode_of(config)])
    for name in ("init_epochs", "freeze_epochs", "warmup"):
        if getattr(config, name) > (config.epochs or 0):
            raise UsageError(f"--{name}", f"there are {config.epochs} epochs in all")
    with blame("--lr-schedule"):
        lr_schedule(config.lr_schedule or "", 1.0)
    config = _with_attack(config)
    with blame("--multinorm" if config.loss == "ce" else "--loss"):
        scheme_of(config)
    return _with_evaluation(config)


def _with_network(config: TrainConfig) -> TrainConfig:
    """--arch, --act and --width; the network of --finetune_model has its own."""
    arch = config.arch or "preact-resnet18"
    with blame("--arch"):
        check_arch(arch)
    if config.finetune_model:
        return config
    network, config = find_network(arch), replace(config, arch=arch)
    fixed = ["width"] if network and network.width is None else ["width", "act"] if split_library(arch) else []
    for name in fixed:
        if getattr(config, name):
            raise UsageError(f"--{name}", f"{arch} says its {name} itself, leave this flag out")
    if network is None:
        return config
    width = network.width and (DATASETS[config.dataset].width or network.width)
    return filled(config, {"act": network.act, "width": width})


def _with_optimizer(config: TrainConfig) -> TrainConfig:
    """The optimizer's own flags. Raises UsageError for one of another optimizer."""
    own = OPTIMIZERS[config.optimizer].flags
    for name in OWN_FLAGS:
        if name not in own and getattr(config, name):
            owner = next(other for other, spec in OPTIMIZERS.items() if name in spec.flags)
            raise UsageError(f"--{name}", f"it is a setting of --optimizer={owner}, leave it out")
    return filled(config, own)


def _with_attack(config: TrainConfig) -> TrainConfig:
    """Scheme, norms and radii."""
    scheme = SCHEMES[config.multinorm or "eat"]
    config = filled(config, {"multinorm": scheme.name if config.attack else None, "l_norms": scheme.norms})
    norms = config.l_norms or ()
    check_norms("--l_norms", norms)
    with blame("--l_eps"):
        eps = tuple(threat.eps for threat in threats_of(config.dataset, norms, config.l_eps))
    config = _with_steps(replace(config, l_eps=eps), scheme)
    config = filled(config, {"trades_beta": 6.0 if config.loss == "trades" else None})
    return replace(config, scheme_options=_scheme_options(config, scheme))


def _with_steps(config: TrainConfig, scheme: type[Scheme]) -> TrainConfig:
    """Steps of the attack in each norm."""
    norms = config.l_norms or ()
    published = STEPS.get(mode_of(config), {}) if not scheme.same_n_iter else {}
    config = filled(config, {"l_iters": tuple(config.at_iter or published.get(norm, 10) for norm in norms)})
    if len(config.l_iters or ()) != len(norms):
        got = f"{len(norms)}; got {len(config.l_iters or ())}"
        raise UsageError("--l_iters", f"one number of steps for each norm is needed, {got}")
    return config


def _scheme_options(config: TrainConfig, scheme: type[Scheme]) -> dict[str, float]:
    """All of the scheme's options. Raises UsageError for one of another scheme."""
    own = {o.name: o.fine_tuning if config.finetune_model else o.from_scratch for o in scheme.options}
    for name in config.scheme_options:
        if name not in own:
            owner = next(other.name for other in SCHEMES.values() if name in [o.name for o in other.options])
            raise UsageError(f"--{name}", f"add --multinorm={owner}, whose flag it is")
    return own | dict(config.scheme_options)


def _with_evaluation(config: TrainConfig) -> TrainConfig:
    """Radii of the evaluations."""
    check_norms("--eval_norms", config.eval_norms)
    trained = dict(zip(config.l_norms or (), config.l_eps or (), strict=True)) if config.attack else {}
    with blame("--eval_eps"):
        found = threats_of(config.dataset, config.eval_norms, config.eval_eps, trained)
    return replace(config, eval_eps=tuple(threat.eps for threat in found))


def check_norms(name: str, norms: Sequence[str]) -> None:
    """Raises UsageError, of the flag `name`, for a norm that is unknown or named twice."""
    with blame(name):
        threats(norms, [0.5] * len(norms))


def curves_of(norms: Sequence[str], asked: Curves) -> Curves:
    """The radii of each norm that has a curve: all norms if none is asked for. Raises ValueError for radii that are not of these norms."""
    if not asked:
        return dict.fromkeys(norms, ())
    if "" in asked:
        if len({*norms, *asked}) > 2:
            raise ValueError(f"say of which norm each radius is, such as '{norms[0]}:{asked[''][0]:g}'")
        asked = {norms[0]: asked[""]}
    for norm, radii in asked.items():
        if norm not in norms:
            raise ValueError(f"{printable(norm, 60)} is not evaluated, give radii of {' '.join(norms)}")
        for smaller, radius in pairwise([0.0, *sorted(radii)]):
            threats([norm], [radius])
            if isclose(smaller, radius, rel_tol=1e-6):
                raise ValueError(f"the radius {radius:g} in {norm} is given twice, name it once")
    return asked


def threats_of(
    dataset: str, norms: Sequence[str], eps: Sequence[float] | None, others: Mapping[str, float] | None = None
) -> list[Threat]:
    """One threat model per norm: its radius in eps, or if that is None in `others`, else the data set's. Raises ValueError."""
    radii = {**DATASETS[dataset].radii, **(others or {})}
    if eps is None:
        if missing := [norm for norm in norms if norm not in radii]:
            raise ValueError(f"{dataset} has no radius of its own for {' '.join(missing)}, give one for each norm")
        eps = [radii[norm] for norm in norms]
    return threats(norms, eps)


def scheme_of(config: TrainConfig) -> Scheme:
    """The scheme that a resolved configuration names. Raises ValueError."""
    scheme = Scheme([])
    if config.attack:
        name, threats, steps = config.multinorm or "eat", training_threats(config), config.l_iters or ()
        scheme = make_scheme(name, threats, steps, config.scheme_options, config.trades_beta)
    scheme.label_smoothing = config.label_smoothing
    return scheme


def training_threats(config: TrainConfig) -> list[Threat]:
    """Of a resolved configuration."""
    return threats_of(config.dataset, config.l_norms or (), config.l_eps)


def evaluation_threats(config: TrainConfig) -> list[Threat]:
    """Of a resolved configuration."""
    return threats_of(config.dataset, config.eval_norms, config.eval_eps)


def completed(config: TrainConfig, spec: Spec, dataset: Dataset) -> TrainConfig:
    """A resolved configuration with the settings that depend on the loaded network and data set. Raises UsageError if they don't fit."""
    of_files = isinstance(dataset.train, FolderSplit)
    if config.image_size and not of_files:
        raise UsageError("--image_size", f"the images of {config.dataset} have one size, leave this flag out")
    for name, asked, there in (
        ("--n_ex_train", config.n_ex_train, len(dataset.train)),
        ("--n_ex_eval", config.n_ex_eval if config.eval_freq else 1, min(len(dataset.train), len(dataset.test))),
        ("--n_ex_final", config.n_ex_final, len(dataset.test)),
    ):
        if asked and asked > there:
            raise UsageError(name, f"{config.dataset} has {there} such images, {asked} were asked for")
    for name in ("head_lr", "freeze_epochs"):
        if getattr(config, name) and "head" not in spec:
            raise UsageError(f"--{name}", "the network keeps its last layer; --head=auto puts a new one in its place")
    settings = {
        "image_size": dataset.shape[1] if of_files else None,
        "n_ex_train": len(dataset.train),
        "n_ex_final": min(1000, len(dataset.test)),
        "lr_max": _lr_max(config, spec),
        "extra_fraction": 0.5 if config.extra_data else None,
    }
    return filled(config, settings)


def _lr_max(config: TrainConfig, spec: Spec) -> float:
    """The published peak learning rate, or what is usual for another optimizer than SGD."""
    if usual := OPTIMIZERS[config.optimizer].lr_max:
        return usual[config.finetune_model]
    if mode_of(config) == "fine-tuning on imagenet":
        return 1e-4 if "xcit" in (config.model_name or "").lower() else 0.005
    network = find_network(spec.get("arch", ""))
    return (network.finetune_lr if network else FINETUNE_LR) if config.finetune_model else 0.05


def check_processes(config: TrainConfig, world_size: int) -> None:
    """Raises UsageError unless each micro-batch of each process gets two images: BatchNorm may fail on one."""
    if world_size > 1 and (config.n_ex_train or 0) < 2 * world_size:
        raise UsageError("--n_ex_train", f"{world_size} processes need two images each, got {config.n_ex_train}")
    least = 2 * world_size * config.accumulate
    if least > 2 and config.batch_size < least:
        processes = f"{world_size} processes with " if world_size > 1 else ""
        need = f"{processes}--accumulate={config.accumulate} needs two images for each micro-batch, {least} in all"
        raise UsageError("--batch_size", f"{need}; got {config.batch_size}")


def checked_eval(config: EvalConfig) -> EvalConfig:
    """The configuration, with the norms of --curve. Raises UsageError for flags that don't fit together."""
    check(config, EVAL_RULES)
    check_norms("--l_norms", config.l_norms)
    if config.curve is not None:
        with blame("--curve"):
            config = replace(config, curve=curves_of(config.l_norms, config.curve))
    if config.l_eps:
        with blame("--l_eps"):
            threats(config.l_norms, config.l_eps)
    with blame("--attacks"):
        for norm in config.l_norms:
            AttackPlan(config.attacks).runs(norm, num_classes=2)
    return config


def make_parser(config: type[Config], description: str | None) -> Parser:
    """The command line of train.py (TrainConfig) or eval.py (EvalConfig)."""
    train = config is TrainConfig
    parser = Parser(
        prog="train.py" if train else "eval.py", description=description, epilog=summaries() if train else None
    )
    add_fields(parser, config, GROUPS)
    if train:
        group = parser.add_argument_group("options of --multinorm")
        for name, option in _options().items():
            text = f"{option.help} ({option.from_scratch:g}; fine-tuning: {option.fine_tuning:g})"
            add_flag(group, f"--{name}", type=non_negative_float, default=SUPPRESS, help=text)
    return parser


def flags_given(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags on a command line, by field. Usage errors end the program."""
    flags = vars(parser.parse_args(argv))
    options = {name: flags.pop(name) for name in _options() if name in flags}
    return flags | ({"scheme_options": options} if options else {})


def _options() -> dict[str, Option]:
    return {option.name: option for scheme in SCHEMES.values() for option in scheme.options}


def config_json(config: TrainConfig, asked: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds: every flag by name, `asked`, those on the command line, and facts about what was loaded."""
    flags = {each.name: getattr(config, each.name) for each in fields(config) if each.name != "scheme_options"}
    return {**flags, **config.scheme_options, **facts, "asked": dict(asked)}


def loaded_facts(spec: Spec, dataset: Dataset) -> dict[str, Any]:
    """What must be the same when the run is resumed: the network, and the content of the extra images."""
    return {"network": dict(spec)} | ({"extra_content": dataset.extra.content} if dataset.extra else {})


def config_from_json(content: Mapping[str, Any], folder: Path) -> TrainConfig:
    """The configuration that `config_json` wrote. Raises ValueError if another version did, or for values that no flag takes."""
    names = {each.name for each in fields(TrainConfig)} - {"scheme_options"}
    if not {*names, "asked"} <= content.keys():
        old = "was written by another version of train.py; fine-tune from its last checkpoint with --model_name"
        raise ValueError(f"{folder / 'config.json'} {old}")
    try:
        values = {each.name: _value(each, content[each.name]) for each in fields(TrainConfig) if each.name in names}
        options = {name: non_negative_float(str(content[name])) for name in _options() if name in content}
    except (ValueError, ArgumentTypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return TrainConfig(**values, scheme_options=options)


def _value(flag: Field[Any], content: Any) -> Any:
    """A value of JSON, as the flag would read it from a command line. Raises ValueError or ArgumentTypeError, also for another type."""
    kind, choices = kind_of(flag), flag.metadata.get("choices")
    is_content = f"{flag.name} is {printable(repr(content), 60)}"
    if content is None and flag.default is None:
        return None
    if kind is None:
        if content in list(choices or []) or (not choices and isinstance(content, bool)):
            return content
        register = "; if a file of yours registers it, resume with that file" if choices else ""
        raise ValueError(f"{is_content}, which is unknown here{register}")
    value = kind(" ".join(map(str, content)) if isinstance(content, list) else str(content))
    if content != (list(value) if isinstance(value, tuple) else value):
        raise ValueError(f"{is_content}, which is of another type")
    return value


def resumed(saved: TrainConfig, asked: Mapping[str, Any], folder: Path) -> TrainConfig:
    """The saved configuration with the flags of a new command. Raises ValueError where they would change the weights.

    Code that only the run's files name is not run: a FILE.py has to be named by the new command too.
    """
    for name in ("model_name", "arch"):
        code = getattr(saved, name)
        if code and split_own_function(code) and asked.get(name) != code:
            raise ValueError(f"its network is made by code, name that again: --{name}='{code}'")
    new = {**asked, **asked.get("scheme_options", {})}
    before = {**vars(saved), **saved.scheme_options}
    different = [name for name in new if name not in ("scheme_options", *RESUMABLE) and new[name] != before.get(name)]
    if different:
        raise ValueError(f"{folder} was started with another {', '.join(different)}: leave it as it was")
    return replace(saved, **{name: value for name, value in asked.items() if name in RESUMABLE})  # the rest is the same


def same_command(asked: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Do two command lines ask for the same training?"""
    one, other = (
        json.dumps({k: v for k, v in asdict(TrainConfig(**flags)).items() if RESUMABLE.get(k) is not True})
        for flags in (asked, others)
    )
    return one == other


RESUMABLE = {each.name: each.metadata["resumable"] for each in fields(TrainConfig) if each.metadata.get("resumable")}
# Fields that run_name writes itself, and values that it leaves out.
NAMED = (
    "dataset",
    "finetune_model",
    "model_name",
    "arch",
    "attack",
    "multinorm",
    "l_norms",
    "loss",
    "seed",
    "notes_run",
)
ATTACK_FLAGS = [each.name for each in fields(TrainConfig) if each.metadata.get("group") == "attack"]
UNSAID = (None, "", "preact-resnet18", "eat", "ce")


def differences(config: TrainConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of the flags given, those that matter: with the default instead, the resolved configuration would differ or be refused."""
    found = {name: value for name, value in asked.items() if name != "scheme_options" and _matters(config, name)}
    return found | dict(asked.get("scheme_options", {}))


def _matters(config: TrainConfig, name: str) -> bool:
    default: Any = next(each.default for each in fields(TrainConfig) if each.name == name)
    try:
        return bool(getattr(resolved(replace(config, **{name: default})), name) != getattr(config, name))
    except UsageError:
        return True


def run_name(config: TrainConfig, asked: Mapping[str, Any]) -> list[str]:
    """The parts of a run folder's name: data set, start, attack, what else is not the default, seed, --notes_run."""
    start = ["from-scratch", Path(config.arch or "").name]
    if config.finetune_model:
        start = [f"from-{Path(without_digest(config.model_name or '')).name.removesuffix('.pth')}"]
    attack = [config.attack, config.multinorm, "-".join(config.l_norms or ())] if config.attack else ["no-attack"]
    words = [word for word in (config.dataset, *start, *attack, config.loss) if word not in UNSAID]
    unnamed = {*NAMED, *RESUMABLE, *(() if config.attack else ATTACK_FLAGS)}
    others = {name: value for name, value in differences(config, asked).items() if name not in unnamed}
    more = [f"{name}-{_short(value)}" for name, value in others.items()]
    return [*map(str, words), *more, f"seed{config.seed}", *([config.notes_run] if config.notes_run else [])]


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
