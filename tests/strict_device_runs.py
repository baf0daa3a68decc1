"""Trains and evaluates on the strict device; prints as JSON what waited and how many kernels were launched, for its test."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:0] = [str(Path(__file__).parent), ROOT]

import strict_device  # noqa: E402

strict_device.as_cuda(ROOT)

import torch  # noqa: E402
from strict_device import DEVICE, WAITS, log  # noqa: E402

import eval as eval_script  # noqa: E402
import train  # noqa: E402
from attacks import Threat, apgd  # noqa: E402
from attacks.apgd import loss_and_grad  # noqa: E402
from attacks.losses import cross_entropy  # noqa: E402
from attacks.multinorm import SCHEMES  # noqa: E402
from attacks.standard import ThreatEvaluator  # noqa: E402
from evaluation.evaluate import _low_precision  # noqa: E402
from models import build_model  # noqa: E402

ON_DEVICE = ["--device=npy", "--no_cuda_graphs"]
FLAGS = [
    "--dataset=digits",
    "--width=8",
    "--n_ex_train=96",
    "--batch_size=32",
    "--attack=apgd",
    "--at_iter=2",
    *ON_DEVICE,
]
SETTINGS: dict[str, list[str]] = {name: [f"--multinorm={name}"] for name in SCHEMES} | {
    "trades": ["--loss=trades"],
    "ema": ["--ema=0.9"],
    "clip and accumulate": ["--grad_clip=1", "--accumulate=2"],
    "bf16": ["--amp=bf16"],
    "fp16": ["--amp=fp16"],
    "gradient projection": ["--gradient_projection"],
    "init epochs": ["--init_epochs=1"],
    "awp, adamw, growing radii": ["--awp=0.01", "--optimizer=adamw", "--eps_warmup=0.5", "--label_smoothing=0.1"],
    "relu, normalised": ["--act=relu", "--mean=0.3", "--std=0.4"],
}
# Kernels that CUDA does not launch: views and allocations.
VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "expand",
        "as_strided",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "t",
        "detach",
        "alias",
    ),
    *("permute", "transpose", "split", "split_with_sizes", "unbind", "lift", "reshape", "_reshape_alias", "diagonal"),
    *("view_as", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
}


def kernels() -> int:
    return sum(count for name, count in log.ops.items() if name.split(".")[1] not in VIEWS)


def launched(function: Callable[[], Any]) -> int:
    function()
    log.clear()
    function()
    return kernels()


def waits(mark: str) -> Counter[str]:
    return Counter(f"{kind} {op} {place}" for kind, op, place, when in log.events if kind in WAITS and when == mark)


def train_on_it() -> dict[str, dict[str, int]]:
    """For each setting what waited in the second epoch of three steps: what comes once is the epoch's."""
    inner = train.train_epoch

    def noting(trainer: Any) -> None:
        log.mark = f"epoch {trainer.epoch}"
        inner(trainer)
        log.mark = ""

    train.train_epoch = noting  # type: ignore[assignment]
    found = {}
    for name, flags in SETTINGS.items():
        log.clear()
        train.main([*FLAGS, *flags, "--epochs=2", "--save_every=999"])
        found[name] = {place: count for place, count in waits("epoch 1").items() if count > 1}
    train.train_epoch = inner
    return found


def resume_on_it() -> float:
    """Train three epochs at once, and one and two: the furthest that the weights are apart."""
    whole = train.main([*FLAGS, "--epochs=3", "--ema=0.9", "--save_dir=whole"])
    inner = train.finish_epoch

    def cut_off(trainer: Any, board: Any) -> None:
        inner(trainer, board)
        trainer.save()
        raise KeyboardInterrupt

    train.finish_epoch = cut_off  # type: ignore[assignment]
    try:
        train.main([*FLAGS, "--epochs=3", "--ema=0.9", "--save_dir=cut"])
    except KeyboardInterrupt:
        train.finish_epoch = inner
    [cut] = Path("cut").iterdir()
    train.main([f"--resume={cut}", "--device=npy"])
    one, other = (torch.load(folder / "ep_3_ema.pth", weights_only=True)["state_dict"] for folder in (whole, cut))
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def evaluate_on_it() -> dict[str, Any]:
    """The most waits of a step of the standard evaluation, and its outcomes there and on the CPU."""
    folder = train.main(
        [*FLAGS[:2], *ON_DEVICE, "--epochs=4", "--batch_size=64", "--lr-max=0.1", "--save_dir=evaluated"]
    )
    steps: list[int] = []
    inner = ThreatEvaluator._judge

    def noting(self: Any, *args: Any) -> Any:
        # From one judgement to the next is a step: joining new rows, the pass, the move.
        steps.append(sum(1 for kind, *_ in log.events if kind in WAITS))
        log.events.clear()
        return inner(self, *args)

    ThreatEvaluator._judge = noting  # type: ignore[method-assign]
    flags = [f"--model_name={folder}/ep_4.pth", "--n_ex=40", "--n_iter=10", "--n_targets=2", "--batch_size_eval=16"]
    outcomes = {}
    for device in ("npy", "cpu"):
        log.events.clear()
        steps.clear()
        result = eval_script.main([*flags, f"--device={device}", f"--save_dir={device}"])
        outcomes[device] = json.loads((result / "eval.json").read_text())["outcomes"]
        if device == "npy":
            most = max(steps[1:])
    for more in (["--amp=bf16"], ["--union_only"], ["--curve", "--attacks=fast"]):
        eval_script.main([*flags, "--device=npy", f"--save_dir={more[0].strip('-=')}", *more])
    ThreatEvaluator._judge = inner  # type: ignore[method-assign]
    return {"waits": most, "same": outcomes["npy"] == outcomes["cpu"]}


def count_kernels() -> dict[str, int]:
    """Of a step of each attack, beside the network's; of a pass of the PreAct ResNet-18 to the image in float32 and bfloat16."""
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 8, 8).to(DEVICE), torch.zeros(4, dtype=torch.long).to(DEVICE)
    weight = torch.randn(192, 10).to(DEVICE)

    def tiny(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ weight

    own = launched(lambda: loss_and_grad(tiny, x, y, cross_entropy, True))
    found = {}
    for threat in (Threat("Linf", 0.1), Threat("L2", 0.4), Threat("L1", 2.0)):
        ten, twenty = (launched(lambda n=n, threat=threat: apgd(tiny, x, y, threat, n)) for n in (10, 20))
        found[threat.norm] = (twenty - ten) // 10 - own
    network = build_model("preact-resnet18", width=8).eval().requires_grad_(False).to(DEVICE)
    for name, model in (("float32", network), ("bf16", _low_precision(network, DEVICE, "bf16"))):
        found[name] = launched(lambda model=model: loss_and_grad(model, x, y, cross_entropy, True))
    return found


if __name__ == "__main__":
    parts = {"train": train_on_it, "resume": resume_on_it, "evaluate": evaluate_on_it, "kernels": count_kernels}
    print(json.dumps({name: part() for name, part in parts.items()}))
