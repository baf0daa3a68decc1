"""How a run starts: its configuration, the run to resume, its folder, its data set and network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from config import LATEST, TrainConfig, config_from_json, resumed, run_name, same_command
from data import Dataset, FolderSplit, load_dataset, load_extra
from models import Spec, new_spec
from models.from_file import normalization_of, rebuild
from models.heads import AUTO, outputs, with_new_head
from models.libraries import library_spec, split_library
from models.pretrained import check_fits, check_trains, load_model
from models.robustbench_zoo import published_preparation
from training.optim import layer_factors
from utils.cli import blame
from utils.distributed import Process, print_on_rank0
from utils.modules import eval_mode
from utils.resume import (
    ResumePoint,
    check_same,
    cut_metrics,
    lock_run,
    newest_run,
    note_resumed,
    read_config,
    resume_point,
)
from utils.run_folder import new_folder, write_json


def configured(asked: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the given flags; with --resume=RUN the run's own, with the flags that may change replaced. Raises UsageError."""
    if not asked.get("resume"):
        return TrainConfig(**asked)
    with blame("--resume"):
        folder = Path(asked["resume"])
        saved = config_from_json(read_config(folder), folder)
        return resumed(saved, asked, folder)


def run_to_resume(config: TrainConfig, asked: Mapping[str, Any], stack: ExitStack) -> ResumePoint | None:
    """The run that --resume means, locked; None if there is none. Raises ValueError or OSError."""
    if config.resume is None:
        return None
    folder: Path | None = Path(config.resume)
    if config.resume == LATEST:
        folder = newest_run(config.save_dir, lambda content: same_command(asked, content["asked"]))
    if folder is None:
        print(f"--resume: there is no run of this command in {config.save_dir} yet, this is a new one")
        return None
    return resume_point(folder, stack)


def new_run(config: TrainConfig, content: dict[str, Any], env: dict[str, Any], stack: ExitStack) -> Path:
    """A new folder with config.json and env.json. Raises OSError."""
    folder = new_folder(config.save_dir, run_name(config, content["asked"]))
    stack.enter_context(lock_run(folder, seconds=0))
    write_json(folder / "env.json", {"run": uuid4().hex} | env)
    write_json(folder / "config.json", content)
    return folder


def resumed_run(folder: Path, content: dict[str, Any], epochs: int, env: dict[str, Any]) -> Path:
    """Make a run's folder ready to resume: metrics.jsonl cut to the first `epochs`. Raises ValueError if network or data differ."""
    check_same(
        folder, {name: content[name] for name in ("network", "extra_content", "extra_fraction") if name in content}
    )
    cut_metrics(folder / "metrics.jsonl", epochs)
    if other := note_resumed(folder, env):
        print(f"the run was started with another {', '.join(other)}: weights may differ from an uninterrupted run's")
    return folder


def load(config: TrainConfig, state: dict[str, Any] | None) -> tuple[Dataset, nn.Module, Spec]:
    """Data set, model and the model's spec as the flags say, the model as the training state says if one is given. Raises UsageError."""
    torch.manual_seed(config.seed)
    if state:
        spec = dict(state["spec"])
        with blame("--resume"):
            model = rebuild(spec, config.model_name or config.arch)
        return data_set(config, spec, config.image_size or state.get("image_size")), model, spec
    if config.finetune_model:
        with blame("--model_name"):
            loaded = load_model(config.model_name or "", config.model_dir, config.dataset, config.network_flags())
        print_on_rank0(*loaded.notes)
        dataset = data_set(config, loaded.spec, config.image_size or loaded.about.get("image_size"))
        with blame("--head"):
            return dataset, loaded.model, fitted_head(config, loaded.model, loaded.spec, dataset)
    arch = config.arch or ""
    with blame("--arch"):
        size = library_spec(arch, num_classes=1)["image_size"] if split_library(arch) else None
    dataset = data_set(config, Spec(), config.image_size or size)
    with blame("--arch"):
        spec = spec_from_scratch(config, dataset)
        return dataset, rebuild(spec, arch), spec


def spec_from_scratch(config: TrainConfig, dataset: Dataset) -> Spec:
    """Of the network of --arch, for the data set. Raises ValueError."""
    arch, classes, normalization = config.arch or "", dataset.num_classes, normalization_of(config.network_flags())
    size = dataset.shape[1] if split_library(arch) else None  # which others do not need
    sizes = {"num_classes": classes, "in_channels": dataset.shape[0], "image_size": size}
    return new_spec(arch, **sizes, act=config.act, width=config.width, **normalization)


def fitted_head(config: TrainConfig, model: nn.Module, spec: Spec, dataset: Dataset) -> Spec:
    """A new last layer, if --head asks for one or the data set has other classes; the spec of the network as it is then."""
    if not config.head and outputs(model, dataset.shape) in (dataset.num_classes, None):
        return spec  # of a network that does not take the images `check_model` says so
    new = with_new_head(model, spec, config.head or AUTO, dataset.shape, dataset.num_classes)
    print_on_rank0(f"new last layer with random weights: {new['head']}, {dataset.num_classes} outputs")
    return new


def data_set(config: TrainConfig, spec: Spec, size: int | None) -> Dataset:
    """The data set of the flags, with extra images, for the network of `spec`, of `size` pixels if it is of files. Raises UsageError."""
    with blame("--data_dir"):
        preparation = published_preparation(spec, size)
        dataset = load_dataset(config.dataset, config.data_dir, size or 224, preparation, config.class_order)
        if not len(dataset.train):
            raise ValueError(f"there is no folder train/ in {config.data_dir}: only eval.py can do without")
    print_on_rank0(*dataset.notes)
    if config.n_ex_val:
        with blame("--n_ex_val"):
            dataset = dataset.hold_out(config.n_ex_val)
    if config.extra_data:
        with blame("--extra_data"):
            dataset = replace(dataset, extra=load_extra(config.extra_data, dataset))
    return dataset


def check_images(dataset: Dataset, process: Process) -> None:
    """Raises UsageError that names an image file that can't be read, training or test, if there is one."""
    for split in (dataset.train, dataset.test):
        if isinstance(split, FolderSplit):
            with blame("--data_dir"):
                split.check(process)


def check_model(config: TrainConfig, model: nn.Module, dataset: Dataset) -> None:
    """Raises UsageError unless the network takes the images, trains on its smallest mini-batch, and has layers for --layer_decay."""
    with blame("--model_name" if config.finetune_model else "--arch"), eval_mode(model):
        check_fits(model, dataset.shape, dataset.num_classes)
    alone = 1 in (config.batch_size, config.n_ex_train)
    if alone:
        where = "--batch_size" if config.batch_size == 1 else "--n_ex_train"
    with blame(where if alone else "--model_name" if config.finetune_model else "--arch"):
        check_trains(model, dataset.shape, dataset.num_classes, 1 if alone else 2)
    if config.layer_decay:
        with blame("--layer_decay"):
            layer_factors(model, config.layer_decay)
