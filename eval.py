"""Robust accuracy of a network for several Lp norms and their union.

python eval.py --model_name=runs/RUN/ep_80.pth --n_ex=1000                   your own run
python eval.py --model_name=pretr_L1.pth --l_norms='Linf L2 L1'              the authors' networks (downloaded to --model_dir)
python eval.py --model_name=RB_Engstrom2019Robustness                        RobustBench's
python eval.py --model_name=my_nets.py:make_net                              your function, which returns a module on [0, 1] images
python eval.py --dataset=imagenet --data_dir=DIR --model_name=RB_Salman2020Do_R50    DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg

The standard evaluation: APGD-CE and APGD-T, 100 steps, 10 runs in all for each norm (arXiv 2105.12508, section 5);
in L1 first a brief APGD-CE of n_iter / 5 steps without the larger radii.
"""

from __future__ import annotations

import utils.installed  # noqa: F401

# isort: split

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attacks.early_stop import DEFAULT_EFFORT
from attacks.network import Examples, Network
from attacks.results import AttackPlan
from config import EvalConfig, checked_eval, flags_given, make_parser, threats_of
from data import DATASETS, Dataset, FolderSplit, Split, load_dataset
from evaluation.baseline import check_baseline, compared, read_baseline
from evaluation.curve import curve_radii
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.files import Evaluated, summary, write_files
from evaluation.statistics import evaluation_json
from evaluation.storage import evaluation_folder
from models.from_file import Loaded
from models.pretrained import check_fits, load_model
from models.robustbench_zoo import published_preparation
from utils.cli import UsageError, blame, one_line_end, usage_errors
from utils.distributed import Process, choose_device, local_device, print_on_rank0, process_group, run_on_rank0
from utils.precision import check_amp, set_up_torch
from utils.run_folder import environment
from utils.signals import Signals
from utils.text import printable


def main(argv: Sequence[str] | None = None) -> Path:
    """Load, attack, print the table, save eval.json and the adversarial examples. Returns the result's folder."""
    with (
        usage_errors("eval.py"),
        Signals() as signals,
        one_line_end("eval.py", signals, argv) as folders,
        ExitStack() as stack,
    ):
        config = checked_eval(EvalConfig(**flags_given(make_parser(EvalConfig, __doc__), argv)))
        with blame("--baseline"):
            baseline = read_baseline(config.baseline) if config.baseline else None
        with blame("--device"):
            device = local_device(choose_device(config.device))
        with blame("--amp"):
            check_amp(device, config.amp)
        set_up_torch(config.threads, tf32=False)
        with blame("--model_name"):
            loaded = load_model(
                config.model_name or "", config.model_dir, config.dataset or "cifar10", config.network_flags()
            )
        config = replace(config, dataset=config.dataset or trained_on(loaded))
        print_on_rank0(*loaded.notes)
        data, config = load_data(config, loaded)
        if baseline:
            with blame("--baseline"):
                radii = dict(zip(config.l_norms, config.l_eps or (), strict=False))  # none with --only_clean
                check_baseline(config.baseline or "", baseline, asdict(config), radii)
        loaded = replace(loaded, model=loaded.model.eval().to(device).requires_grad_(False))
        with blame("--model_name"):
            check_fits(loaded.model, data.shape, data.num_classes)
        process = stack.enter_context(process_group(device))
        with blame("--data_dir"):
            data = replace(data, test=data.test.take(config.n_ex or 0).in_memory(process))
        # Rank 0 chooses the folder; its error is raised on all ranks.
        with blame("--resume" if config.resume else "--save_dir"):
            folder = run_on_rank0(lambda: evaluation_folder(*config.folder(), stack))
        folders.append(folder)
        evaluate_and_report(config, data, loaded, process, folder, baseline)
        return folder


def trained_on(loaded: Loaded) -> str:
    """The data set that the checkpoint names, if it is one of ours; else cifar10."""
    name = loaded.about.get("dataset", "cifar10")
    if name in DATASETS:
        return str(name)
    print_on_rank0(f"its checkpoint names the data set {name!r}, which is none here: cifar10 is taken (--dataset)")
    return "cifar10"


def load_data(config: EvalConfig, loaded: Loaded) -> tuple[Dataset, EvalConfig]:
    """The data set, and the configuration with the settings that depend on it. Raises UsageError."""
    dataset, size = config.dataset or "", config.image_size or loaded.about.get("image_size")
    with blame("--l_eps"):
        threats = [] if config.only_clean else threats_of(dataset, config.l_norms, config.l_eps)
    with blame("--data_dir"):
        preparation = published_preparation(loaded.spec, size)
        data = load_dataset(dataset, config.data_dir, size or 224, preparation, config.class_order)
    of_files = isinstance(data.test, FolderSplit)
    print_on_rank0(*data.notes)
    if config.image_size and not of_files:
        raise UsageError("--image_size", f"the images of {dataset} have one size, leave this flag out")
    if config.n_ex and config.n_ex > len(data.test):
        raise UsageError("--n_ex", f"{dataset} has {len(data.test)} test images, {config.n_ex} were asked for")
    return data, replace(
        config,
        l_eps=tuple(threat.eps for threat in threats),
        image_size=data.shape[1] if of_files else None,
        n_ex=config.n_ex or min(1000, len(data.test)),
    )


def evaluate_and_report(
    config: EvalConfig,
    data: Dataset,
    loaded: Loaded,
    process: Process,
    folder: Path,
    baseline: dict[str, Any] | None,
) -> None:
    """Attack, print, save; the data set's test images are in memory, the network is on the process' device."""
    test, model = data.test, loaded.model
    assert isinstance(test, Split)
    threats = [] if config.only_clean else threats_of(config.dataset or "", config.l_norms, config.l_eps)
    if process.is_rank0:
        attacked = ", ".join(map(str, threats)) or "no attack"
        what = f"{config.model_name} on {config.n_ex} test images of {config.dataset}"
        print(f"{printable(what)}: {attacked}; on {process.device}", flush=True)
    examples = Examples(test.images, test.labels, test.levels)
    options = EvaluationOptions(process, config.batch_size_eval, config.amp, curve_radii(threats, config.curve))
    start, env = time.time(), environment(process.device)
    result = evaluate(model, examples, threats, attack_plan(config), options, folder)
    if process.is_rank0:
        about = {"seconds": round(time.time() - start, 1), "settings": asdict(config), "network": loaded.spec}
        content = evaluation_json(result) | about | {"environment": env}
        if baseline:
            content |= compared(content, baseline, config.baseline or "")
        print(summary(content))
        write_files(folder, content, Evaluated(result, Network(model, process.device), examples, data.class_names))
        print(f"saved in {folder}; open report.html there to look at it")


def attack_plan(config: EvalConfig) -> AttackPlan:
    """What the flags ask for."""
    numbers = config.n_iter, config.n_restarts, config.n_targets
    return AttackPlan(config.attacks, *numbers, config.union_only, config.seed, config.effort or DEFAULT_EFFORT)


if __name__ == "__main__":
    main()
