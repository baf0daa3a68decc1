"""The optimizer with its parameter groups, and the exponential moving average (EMA) of the weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn, optim

from config import TrainConfig
from utils.optimizers import OPTIMIZERS


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_no_decay: float | None
) -> list[dict[str, object]]:
    """Groups as published for training from scratch: decay for weights, none for biases and norm layers (all 1-d parameters).

    lr_no_decay, if given, is the second group's constant learning rate (1.0 in the authors' code); else it follows the schedule.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "params": others,
            "lr": lr if lr_no_decay is None else lr_no_decay,
            "weight_decay": 0.0,
            "constant_lr": lr_no_decay is not None,
        },
    ]


class EMA:
    """EMA of weights and BatchNorm statistics, as `module`: decay * average + (1 - decay) * model after each training step.

    It starts as a copy of the model after the first step. What is not floating, such as BatchNorm's counters, is the model's. Unlike
    torch.optim.swa_utils.AveragedModel it makes the host wait for no device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(model).requires_grad_(False).eval(), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a training step of the model."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        floating: list[tuple[torch.Tensor, torch.Tensor]] = []
        others: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in pairs:
            (floating if self.updates and pair[0].is_floating_point() else others).append(pair)
        if floating:
            averages, values = map(list, zip(*floating, strict=True))
            torch._foreach_lerp_(averages, values, 1 - self.decay)
        if others:
            averages, values = map(list, zip(*others, strict=True))
            torch._foreach_copy_(averages, values)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """To resume from."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put it back."""
        self.module.load_state_dict(state_dict["module"])
        self.updates = state_dict["updates"]


def fine_tuning_groups(model: nn.Module, config: TrainConfig, head: str | None = None) -> list[dict[str, object]]:
    """Groups of one learning rate each, all with weight decay; those of a new last layer, `head`, come last. Raises ValueError."""
    own = {id(p) for p in model.get_submodule(head).parameters()} if head else set()
    factors = layer_factors(model, config.layer_decay) if config.layer_decay else {}
    decay, groups = config.weight_decay or 0.0, defaultdict[tuple[bool, float], list[nn.Parameter]](list)
    for parameter in model.parameters():
        new = id(parameter) in own
        groups[new, factors.get(id(parameter), 1.0) * (config.head_lr or 1.0 if new else 1.0)].append(parameter)
    return [
        {"params": groups[new, factor], "weight_decay": decay, "backbone": bool(head) and not new, "lr_factor": factor}
        for new, factor in sorted(groups)
    ]


def layer_factors(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """What multiplies the learning rate of each parameter, by its id: layer_decay ** (number of later layers), as timm counts layers.

    Raises ValueError if no network of timm, which knows its layers, is in the model.
    """
    from timm.optim.optim_factory import param_groups_layer_decay  # here, since importing timm takes seconds

    network = next((module for module in model.modules() if hasattr(module, "group_matcher")), None)
    if network is None:
        raise ValueError("it is for networks of timm, which know their layers: --model_name=timm:NAME")
    groups = param_groups_layer_decay(network, layer_decay=layer_decay)
    return {id(p): group["lr_scale"] for group in groups for p in group["params"]}


def set_lr(optimizer: optim.Optimizer, lr: float, frozen: bool = False) -> None:
    """Set the learning rate of every parameter group, but of those marked `constant_lr`; with `frozen` 0 for the backbone."""
    for group in optimizer.param_groups:
        if not group.get("constant_lr"):
            group["lr"] = 0.0 if frozen and group.get("backbone") else lr * group.get("lr_factor", 1.0)


def forget_backbone(optimizer: optim.Optimizer) -> None:
    """Drop the backbone's momentum, which it gathered while it was frozen."""
    for group in optimizer.param_groups:
        if group.get("backbone"):
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)


def make_optimizer(config: TrainConfig, model: nn.Module, head: str | None = None) -> optim.Optimizer:
    """That of --optimizer, with the parameter groups of training from scratch or of fine-tuning; head: the name of a new last layer."""
    lr = config.lr_max or 0.0
    if config.finetune_model:
        groups = fine_tuning_groups(model, config, head)
    else:
        groups = parameter_groups(model, lr, config.weight_decay or 0.0, config.lr_no_decay)
    spec = OPTIMIZERS[config.optimizer]
    own = {name: getattr(config, name) for name in spec.flags}
    return spec.build(groups, lr=lr, fused=next(model.parameters()).device.type == "cuda", **own)
