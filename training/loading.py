"""The data set and the network of a training run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from config import TrainConfig
from data import Dataset, load_dataset, load_extra
from models import Spec, build_model, new_spec
from models.pretrained import check_fits, check_one_point, load_model, rebuild
from models.robustbench_zoo import published_preparation
from utils.cli import blame
from utils.modules import eval_mode


def load(config: TrainConfig, state: dict[str, Any] | None) -> tuple[Dataset, nn.Module, Spec]:
    """The data set and the network that the flags name; a training state brings its own network. Raises UsageError."""
    torch.manual_seed(config.seed)
    model, spec = None, Spec()
    about: dict[str, Any] = state or {}
    if state:
        spec = dict(state["spec"])
        with blame("--resume"):
            model = rebuild(spec, config.model_name or config.arch)
    elif config.finetune_model:
        with blame("--model_name"):
            loaded = load_model(config.model_name or "", config.model_dir, config.dataset, config.act, config.arch)
        model, spec, about = loaded.model, loaded.spec, loaded.about
    size = config.image_size or about.get("image_size")
    with blame("--data_dir"):
        dataset = load_dataset(config.dataset, config.data_dir, size or 224, published_preparation(spec, size))
    if config.extra_data:
        with blame("--extra_data"):
            dataset = replace(dataset, extra=load_extra(config.extra_data, dataset))
    if model is None:
        arch, sizes = config.arch or "", {"num_classes": dataset.num_classes, "in_channels": dataset.shape[0]}
        spec = new_spec(arch, **sizes, act=config.act, width=config.width)
        with blame("--arch"):
            model = build_model(arch, **sizes, act=config.act, width=config.width)
    return dataset, model, spec


def check_model(config: TrainConfig, model: nn.Module, dataset: Dataset) -> None:
    """Raises UsageError unless the network takes the images and can be trained on the smallest batch."""
    with blame("--model_name" if config.finetune_model else "--arch"), eval_mode(model):
        check_fits(model, dataset.shape, dataset.num_classes)
    if 1 in (config.batch_size, config.n_ex_train):
        with blame("--batch_size" if config.batch_size == 1 else "--n_ex_train"):
            check_one_point(model, dataset.shape)
