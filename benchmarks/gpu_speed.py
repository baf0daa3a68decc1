"""Speed of training, attacks and evaluation on a GPU: part `speed` of `make gpu` (benchmarks/gpu.py), which writes the table.

python benchmarks/gpu_speed.py [--device=cuda] [--updates=40] [--batch_size=128] [--width=64] [--compile] [--out=FILE.json]

Random images of CIFAR-10's size: the times do not depend on what they show. Times are those of the host with the device idle before
and after, of work that has run before.
"""

from __future__ import annotations

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
from attacks.network import Examples
from attacks.norms import NORMS
from attacks.projections import project_l1
from attacks.results import AttackPlan
from attacks.threat import Threat
from benchmarks.speed import network
from config import TrainConfig, flags_given, make_parser, resolved, threats_of
from data import Dataset, Split
from evaluation.evaluate import EvaluationOptions, evaluate
from models import build_model, new_spec
from training.cuda_graphs import GraphedAttack
from training.metrics import PassCounter
from training.trainer import Trainer
from utils.cli import Parser, add_flag, positive_int
from utils.distributed import Process
from utils.modules import eval_mode, no_param_grad
from utils.precision import AMPS, Amp, autocast_model, cast_weights_once, set_up_torch
from utils.run_folder import write_json
from utils.signals import Signals

Row = dict[str, Any]
KEY_NORMS = ("Linf", "L1")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


class GPUSpeed:
    """What is measured on one device. `updates` is the length of a timed epoch; `width` that of the PreAct ResNet-18."""

    def __init__(self, device: torch.device, updates: int, batch_size: int, width: int, compiles: bool) -> None:
        self.device, self.updates, self.batch_size = device, updates, batch_size
        self.width, self.compiles = width, compiles
        self.on_cuda = device.type == "cuda"

    def table(self) -> dict[str, list[Row]]:
        """Everything, a list of rows each; printed as it comes."""
        found: dict[str, list[Row]] = {}
        for name, rows in (
            ("training", self.training),
            ("attacks", self.attacks),
            ("evaluation", self.evaluation),
            ("projection", self.projection),
        ):
            set_up_torch(None, tf32=name in ("training", "attacks"))
            found[name] = []
            for row in rows():
                found[name].append(row)
                print(name, row, flush=True)
        return found

    def training(self) -> list[Row]:
        """Updates with each format, with CUDA graphs, without, compiled; and with the network laid out plainly."""
        formats: list[Amp] = [amp for amp in AMPS if amp != "fp16" or self.on_cuda]
        one_by_one = ["--no_cuda_graphs"]
        ways = [(True, amp, one_by_one) for amp in formats] if self.width == 64 else []
        ways += [(False, amp, more) for amp in formats for more in ([one_by_one, []] if self.on_cuda else [one_by_one])]
        ways += [(False, "bf16", ["--compile"])] if self.compiles else []
        return [
            self.update(norm, plain, amp, flags, first=norm == KEY_NORMS[0])
            for plain, amp, flags in ways
            for norm in KEY_NORMS
        ]

    def update(self, norm: str, plain: bool, amp: Amp, flags: list[str], first: bool) -> Row:
        """An epoch's milliseconds an update and what the GPU did in it, after an epoch that does not count."""
        row: Row = {"network": "plain" if plain else "ours", "format": amp, "norm": norm}
        row |= {
            "graphs": self.on_cuda and "--no_cuda_graphs" not in flags,
            "compile": "--compile" in flags,
        }
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = self.trainer(norm, plain, [f"--amp={amp}", *flags])
        row["first_epoch_s"] = round(self.seconds(partial(epoch, trainer)), 1)
        spent = 1000 * median(self.seconds(partial(epoch, trainer)) for _ in range(3)) / self.updates
        row |= {"ms": round(spent, 3), "images_per_second": round(1000 * self.batch_size / spent)}
        if self.on_cuda:
            row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            row |= profiled(partial(epoch, trainer), self.updates)
        return row

    def trainer(self, norm: str, plain: bool, flags: list[str]) -> Trainer:
        """A run on random images, one epoch of which is `updates` updates."""
        n = self.updates * self.batch_size
        fixed = ["--attack=apgd", f"--l_norms={norm}", f"--batch_size={self.batch_size}", f"--n_ex_train={n}"]
        config = resolved(TrainConfig(**flags_given(make_parser(TrainConfig, ""), [*fixed, *flags])))
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draws)
        split = Split(images, torch.randint(0, 10, (n,), generator=draws), 255, padding=4, flip=True)
        model = network(plain=True) if plain else self.network()
        spec = new_spec("preact-resnet18", num_classes=10, in_channels=3, act="softplus1", width=self.width)
        dataset = Dataset("cifar10", split, split, tuple("0123456789"))
        trainer = Trainer(config, dataset, (model.to(self.device), spec), Process(self.device), Signals())
        trainer.store_in(Path(tempfile.mkdtemp()))
        return trainer

    def network(self) -> nn.Module:
        """A PreAct ResNet-18 of random weights."""
        torch.manual_seed(0)
        return build_model("preact-resnet18", width=self.width).to(self.device)

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        draws = torch.Generator().manual_seed(0)
        x, y = torch.rand(n, 3, 32, 32, generator=draws), torch.randint(0, 10, (n,), generator=draws)
        return x.to(self.device), y.to(self.device)

    def attacks(self) -> list[Row]:
        """For each norm the time of an attack of ten steps, over that of its bare passes."""
        model, (x, y) = self.network().eval(), self.images(self.batch_size)
        rows = []
        works: dict[str, Callable[..., Any]] = {"passes": bare_passes}
        works |= {
            threat.norm: partial(apgd, threat=threat, n_iter=10) for threat in threats_of("cifar10", list(NORMS), None)
        }
        for amp in ("off", "bf16"):
            forward = autocast_model(model, self.device, amp)  # type: ignore[arg-type]
            for graphs in (False, True) if self.on_cuda else (False,):
                with eval_mode(model), cast_weights_once(self.device, amp) or no_param_grad(model):  # type: ignore[arg-type]
                    times = {}
                    for name, work in works.items():
                        attack = GraphedAttack(work, model, PassCounter()) if graphs else work
                        times[name] = 1000 * self.median_seconds(partial(attack, forward, x, y))
                for norm in NORMS:
                    row: Row = {"norm": norm, "format": amp, "graphs": graphs, "ms": round(times[norm], 3)}
                    rows.append(row | {"over_bare_passes": round(times[norm] / times["passes"], 3)})
        return rows

    def evaluation(self) -> list[Row]:
        """An evaluation of ten steps a run that breaks nothing, as figures are measured: float32 without TF32; and attacked in bf16."""
        model = self.network().eval().requires_grad_(False)
        x, _ = self.images(8 * self.batch_size)
        with torch.no_grad():
            y = torch.cat([model(part).argmax(1) for part in x.split(self.batch_size)]).cpu()
        examples = Examples((x.cpu() * 255).to(torch.uint8), y, 255)
        rows = []
        for amp in ("off", "bf16"):
            options = EvaluationOptions(Process(self.device), 2 * self.batch_size, amp, progress=False)  # type: ignore[arg-type]
            work = partial(evaluate, model, examples, [Threat("Linf", 2e-6)], AttackPlan(n_iter=10), options)
            result = work()
            passes = sum(int(log.passes.sum()) for log in result.logs.values())
            row: Row = {"format": amp, "images_passed_per_second": round(passes / self.seconds(work))}
            rows.append(row | (profiled(work, passes // (2 * self.batch_size)) if self.on_cuda else {}))
        return rows

    def projection(self) -> list[Row]:
        """L1's projection of 128 images: time, and largest difference to the same in float64 on the CPU."""
        delta, x, radius = torch.randn(128, 3, 32, 32) / 10, torch.rand(128, 3, 32, 32), torch.full((128,), 12.0)
        here = [tensor.to(self.device) for tensor in (delta, x, radius)]
        exact = project_l1(delta.double(), x.double(), radius.double())
        error = float((project_l1(*here).cpu() - exact).abs().max())
        return [{"ms": round(1000 * self.median_seconds(partial(project_l1, *here)), 3), "error": error}]

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes until the device is idle again."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def median_seconds(self, work: Callable[[], Any]) -> float:
        """Of nine calls, after two that do not count."""
        return median([self.seconds(work) for _ in range(11)][2:])

    def wait(self) -> None:
        """Until the device is idle."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def epoch(trainer: Trainer) -> None:
    """Train one, from the run's start."""
    train.train_epoch(trainer)
    trainer.epoch_record()  # reads what the last steps copied
    trainer.step = 0
    trainer.metrics.reset()


def bare_passes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The passes of an attack of ten steps."""
    for _ in range(10):
        loss_and_grad(model, x, y, cross_entropy, with_grad=True)
    return loss_and_grad(model, x, y, cross_entropy, with_grad=False)[0]


def profiled(work: Callable[[], Any], steps: int) -> Row:
    """Kernels a step and a second; fractions of the time in which a kernel runs, and in which the host waits. CUDA alone."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
    events = recorded.events() or []
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    waiting = sum(event.time_range.elapsed_us() for event in events if event.name in WAITS) / 1e6
    row: Row = {"kernels": round(len(kernels) / steps), "kernels_per_second": round(len(kernels) / whole)}
    return row | {"busy": round(busy / whole, 3), "waiting": round(waiting / whole, 3)}


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
    speed = GPUSpeed(torch.device(args.device), args.updates, args.batch_size, args.width, args.compile)
    found = speed.table()
    if args.out:
        write_json(Path(args.out), found)


if __name__ == "__main__":
    main()
