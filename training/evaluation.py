"""Evaluations during and after training."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from attacks.network import Examples, Network
from attacks.results import AttackPlan, Evaluation, table
from config import evaluation_threats
from data import FolderSplit, Split
from evaluation.evaluate import EvaluationOptions, evaluate
from evaluation.files import Evaluated, write_page
from evaluation.statistics import evaluation_json
from training.trainer import Trainer
from utils.checkpoint import load_tensors
from utils.distributed import run_on_rank0
from utils.modules import eval_mode, no_param_grad
from utils.precision import full_precision
from utils.run_folder import environment, write_json


def quick_evaluation(trainer: Trainer, model: nn.Module) -> dict[str, Any]:
    """{"train", "test"} -> `Evaluation.accuracies()` of the first --n_ex_eval images under the quick attacks; "val" of all --n_ex_val."""
    plan, data, n = AttackPlan("quick", seed=trainer.config.seed), trainer.dataset, trainer.config.n_ex_eval
    parts = {"train": data.train.take(n), "test": data.test.take(n)} | ({"val": data.val} if data.val else {})
    return {name: evaluated(trainer, model, part, plan, None).accuracies() for name, part in parts.items()}


def final_evaluation(trainer: Trainer, model: nn.Module, suffix: str) -> None:
    """The standard evaluation, printed and saved in the run's folder; continues one that an interrupted process began.

    Of the network after the last epoch, or with --select of the best one.
    """
    start, config = time.time(), trainer.config
    network = trainer.folder / f"{'best' if config.select else f'ep_{config.epochs}'}{suffix}.pth"
    folder = trainer.folder / suffix.removeprefix("_")
    run_on_rank0(lambda: folder.mkdir(exist_ok=True))
    if config.select:
        model = copy.deepcopy(model)  # the training state, which may be saved once more, is the last network's
        model.load_state_dict(load_tensors(network)["state_dict"])
    test, plan = (
        trainer.dataset.test.take(config.n_ex_final or 0).in_memory(trainer.process),
        AttackPlan(seed=config.seed),
    )
    result = evaluated(trainer, model, test, plan, folder)
    if trainer.process.is_rank0:
        settings = asdict(config) | {
            "model_name": str(network),
            "n_ex": len(test),
            "attacks": "standard",
            "n_iter": plan.n_iter,
        }
        about = {"seconds": round(time.time() - start, 1), "settings": settings, "network": trainer.about["spec"]}
        content = evaluation_json(result) | about | {"environment": environment(trainer.process.device)}
        write_json(trainer.folder / f"eval{suffix}.json", content)
        title = ", ".join(["best"] * bool(config.select) + [f"EMA, decay {config.ema}"] * bool(suffix))
        print(table(content["accuracy"], title), *(f"WARNING: {warning}" for warning in content["warnings"]), sep="\n")
        examples, attacked = Examples(test.images, test.labels, test.levels), Network(model, trainer.process.device)
        with eval_mode(model):
            all_of_it = Evaluated(result, attacked, examples, trainer.dataset.class_names)
            write_page(trainer.folder / f"report{suffix}.html", folder, content, all_of_it)


def evaluated(
    trainer: Trainer, model: nn.Module, split: Split | FolderSplit, plan: AttackPlan, folder: Path | None
) -> Evaluation:
    """Evaluate in --eval_norms with the radii of --eval_eps, the images distributed over the processes. Raises Interrupted."""
    read = split.in_memory(trainer.process)
    examples = Examples(read.images, read.labels, read.levels)
    options = EvaluationOptions(trainer.process, trainer.config.batch_size_eval)
    with full_precision(), eval_mode(model), no_param_grad(model), trainer.signals.at_once():
        return evaluate(model, examples, evaluation_threats(trainer.config), plan, options, folder)
