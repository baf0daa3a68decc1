"""SGD with the published parameter groups, and the exponential moving average (EMA) of the weights."""

from __future__ import annotations

from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import TrainConfig


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_no_decay: float | None
) -> list[dict[str, object]]:
    """SGD groups as published for training from scratch: decay for weights, none for biases and norm layers (all 1-d parameters).

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


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """EMA of weights and BatchNorm statistics: decay * average + (1 - decay) * model after each training step; starts as a copy."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group except those marked `constant_lr`."""
    for group in optimizer.param_groups:
        if not group.get("constant_lr"):
            group["lr"] = lr


def sgd(config: TrainConfig, model: nn.Module) -> optim.SGD:
    """SGD with momentum 0.9, with the parameter groups of training from scratch or of fine-tuning."""
    lr, decay = config.lr_max or 0.0, config.weight_decay or 0.0
    if config.finetune_model:
        groups: list[dict[str, object]] = [{"params": list(model.parameters()), "weight_decay": decay}]
    else:
        groups = parameter_groups(model, lr, decay, config.lr_no_decay)
    fused = next(model.parameters()).device.type == "cuda"
    return optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
