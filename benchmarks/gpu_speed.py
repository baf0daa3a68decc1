"""Speed of training and of attacks on a GPU, as a table: part 2 of `make gpu`.

python benchmarks/gpu_speed.py [--device=cuda] [--updates=40] [--batch_size=128] [--width=64] [--compile] [--out=FILE.json]

Random images of CIFAR-10's size: the time does not depend on what they show. Times are those of the host with the device idle before
and after; every way is timed in turn, after updates that do not count.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

import train
from attacks.apgd import apgd, loss_and_grad
from attacks.losses import cross_entropy
from attacks.norms import NORMS
from attacks.projections import project_l1
from benchmarks.speed import network
from config import TrainConfig, flags_given, make_parser, resolved, threats_of
from data import Dataset, Split
from models import build_model, new_spec
from training.cuda_graphs import GraphedAttack
from training.metrics import PassCounter
from training.trainer import Trainer
from utils.cli import Parser, add_flag, positive_int
from utils.distributed import Process
from utils.modules import eval_mode, no_param_grad
from utils.precision import autocast_model, cast_weights_once, full_precision, set_up_torch
from utils.signals import Signals

Times = dict[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    """Of `runs` calls, after two that do not count."""
    found = []
    for number in range(runs + 2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if number > 1:
            found.append(1000 * (time.perf_counter() - start))
    return found


def trainer_of(device: torch.device, args: Any, norm: str, flags: list[str], plain: bool) -> Trainer:
    """A run on random images, one epoch of which is `args.updates` updates."""
    fixed = ["--attack=apgd", f"--l_norms={norm}", f"--batch_size={args.batch_size}", "--save_every=999", "--epochs=9"]
    fixed += [f"--n_ex_train={args.updates * args.batch_size}"]
    config = resolved(TrainConfig(**flags_given(make_parser(TrainConfig, ""), [*fixed, *flags])))
    draws, n = torch.Generator().manual_seed(0), args.updates * args.batch_size
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draws)
    split = Split(images, torch.randint(0, 10, (n,), generator=draws), 255, padding=4, flip=True)
    dataset = Dataset("cifar10", split, split, tuple("0123456789"))
    model = network(plain=True) if plain else build_model("preact-resnet18", width=args.width)
    spec = new_spec("preact-resnet18", num_classes=10, in_channels=3, act="softplus1", width=args.width)
    trainer = Trainer(config, dataset, (model.to(device), spec), Process(device), Signals())
    trainer.store_in(Path(tempfile.mkdtemp()))
    return trainer


def time_updates(device: torch.device, args: Any, norm: str, flags: list[str], plain: bool) -> Times:
    """An epoch's milliseconds an update, its host time, peak memory and kernels, after an epoch that does not count."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = trainer_of(device, args, norm, flags, plain)
    start = time.perf_counter()
    epoch(trainer, device)
    first = time.perf_counter() - start
    times, hosts = [], []
    for _ in range(3):
        start = time.perf_counter()
        host = epoch(trainer, device)
        times.append(1000 * (time.perf_counter() - start) / args.updates)
        hosts.append(1000 * host / args.updates)
    found: Times = {"ms": round(median(times), 3), "host_ms": round(median(hosts), 3), "first_epoch_s": round(first, 1)}
    found["images_per_second"] = round(1000 * args.batch_size / found["ms"])
    if device.type == "cuda":
        found["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        found |= kernels(trainer, device, args.updates)
    return found


def epoch(trainer: Trainer, device: torch.device) -> float:
    """Train one; seconds until the host had launched everything. The learning rate is 0.05, as in the run's first epochs."""
    synchronize(device)
    start = time.perf_counter()
    train.train_epoch(trainer)
    host = time.perf_counter() - start
    synchronize(device)
    trainer._collect()
    trainer.epoch, trainer.step = 0, 0
    trainer.metrics.reset()
    return host


def kernels(trainer: Trainer, device: torch.device, updates: int) -> Times:
    """Kernels an update and the part of the time in which one runs, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = time.perf_counter()
        epoch(trainer, device)
        whole = time.perf_counter() - start
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    return {"kernels": round(len(events) / updates), "busy": round(busy / whole, 3)}


def time_attacks(device: torch.device, args: Any) -> Times:
    """For each norm the time of ten steps over that of their bare passes, bf16 and float32, recorded as graphs and not."""
    model = build_model("preact-resnet18", width=args.width).eval().to(device)
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(args.batch_size, 3, 32, 32, generator=draws).to(device)
    y = torch.randint(0, 10, (args.batch_size,), generator=draws).to(device)
    found: Times = {}
    for amp in ("off", "bf16"):
        forward = autocast_model(model, device, amp)  # type: ignore[arg-type]

        def bare(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            for step in range(11):
                grad = loss_and_grad(model, x, y, cross_entropy, with_grad=step < 10)[1]
            return grad

        works: dict[str, Callable[..., Any]] = {"passes": bare}
        for threat in threats_of("cifar10", list(NORMS), None):
            works[threat.norm] = partial(apgd, threat=threat, n_iter=10)
        context = cast_weights_once(device, amp) or no_param_grad(model)  # type: ignore[arg-type]
        with eval_mode(model), context:
            for graphed in (True, False) if device.type == "cuda" else (False,):
                times = {}
                for name, work in works.items():
                    call = GraphedAttack(work, model, PassCounter()) if graphed else work
                    times[name] = median(milliseconds(partial(call, forward, x, y), device, 9))
                name = f"{amp}, {'graphs' if graphed else 'kernel by kernel'}"
                found[name] = {
                    norm: {"ms": round(times[norm], 2), "over_passes": round(times[norm] / times["passes"], 3)}
                    for norm in NORMS
                }
    return found


def time_evaluation_pass(device: torch.device, args: Any) -> Times:
    """Milliseconds of a pass of an evaluation's batch to the images, float32 without TF32; of L1's projection of 128 images."""
    model = build_model("preact-resnet18", width=args.width).eval().to(device).requires_grad_(False)
    size = 2 * args.batch_size
    x, y = torch.rand(size, 3, 32, 32, device=device), torch.zeros(size, dtype=torch.int64, device=device)
    with full_precision():
        spent = median(milliseconds(lambda: loss_and_grad(model, x, y, cross_entropy, True), device, 9))
    delta, radius = torch.randn_like(x[:128]) / 10, torch.full((128,), 12.0, device=device)[: len(x[:128])]
    projection = median(milliseconds(lambda: project_l1(delta, x[:128], radius), device, 9))
    exact = project_l1(delta.cpu().double(), x[:128].cpu().double(), radius.cpu().double())
    error = float((project_l1(delta, x[:128], radius).cpu() - exact).abs().max())
    return {"images": size, "ms": round(spent, 2), "project_l1_ms": round(projection, 3), "project_l1_error": error}


def main() -> None:
    """Measure, print a line each, write JSON."""
    parser = Parser(prog="benchmarks/gpu_speed.py", description=__doc__)
    add_flag(parser, "--device", default="cuda", help="device (%(default)s)")
    add_flag(parser, "--updates", type=positive_int, default=40, help="of a timed epoch (%(default)s)")
    add_flag(parser, "--batch_size", type=positive_int, default=128, help="images (%(default)s)")
    add_flag(parser, "--width", type=positive_int, default=64, help="of the PreAct ResNet-18 (%(default)s)")
    add_flag(parser, "--compile", action="store_true", help="also with torch.compile, which takes minutes (off)")
    add_flag(parser, "--out", help="JSON file for the result (none)")
    args = parser.parse_args()
    device = torch.device(args.device)
    set_up_torch(None, tf32=True)
    ways = {
        "plain way, TF32": ["--no_cuda_graphs"],
        "plain way, bf16": ["--no_cuda_graphs", "--amp=bf16"],
        "TF32, kernel by kernel": ["--no_cuda_graphs"],
        "TF32": [],
        "bf16, kernel by kernel": ["--no_cuda_graphs", "--amp=bf16"],
        "bf16": ["--amp=bf16"],
    }
    if device.type == "cuda":
        ways["fp16"] = ["--amp=fp16"]
    if args.compile:
        ways |= {"bf16, compile": ["--amp=bf16", "--compile"]}
    found: Times = {"updates": {}}
    for way, flags in ways.items():
        plain = way.startswith("plain")
        if plain and args.width != 64:
            continue
        found["updates"][way] = {norm: time_updates(device, args, norm, flags, plain) for norm in ("Linf", "L1")}
        print(way, found["updates"][way], flush=True)
    for name, measure in (("attacks", time_attacks), ("evaluation", time_evaluation_pass)):
        found[name] = measure(device, args)
        print(name, found[name], flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
