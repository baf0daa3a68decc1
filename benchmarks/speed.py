"""`make bench`: what training and attacking cost beside the plain way and other libraries, on this machine, in paired runs.

python benchmarks/speed.py --rows='update projection' --runs=3     some rows, fewer runs
python benchmarks/speed.py --picture=docs/performance.png          where the time of a training step goes

Rows are markdown: median ratio (the other's time over ours), smallest and largest, goal. docs/performance.md has results.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

import train
from attacks.multinorm import AdversarialBatch, Scheme
from attacks.norms import NORMS
from attacks.projections import project_l1
from attacks.threat import Threat
from benchmarks import libraries
from config import threats_of
from data import BatchLoader, Split, load_dataset
from models import build_model
from utils.cli import Parser, add_flag, positive_int, words
from utils.modules import eval_mode, no_param_grad
from utils.precision import Amp, autocast_model, keep_freed_memory

apgd_module = import_module("attacks.apgd")  # `attacks.apgd` itself is the function
CPU = torch.device("cpu")
KEY_NORMS = ("Linf", "L1")
WAYS: dict[str, Amp | None] = {"plain": None, "float32": "off", "bf16": "bf16"}
Work = Callable[[], Any]


def seconds(work: Work) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(works: dict[str, Work], runs: int) -> dict[str, list[float]]:
    """Seconds of each in turn, `runs` times after a first one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(runs + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                times[name].append(spent)
    return times


def row(what: str, ratios: list[float], goal: str, more: str = "") -> None:
    """One line of the table."""
    print(f"| {what} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {goal} | {more} |", flush=True)


def over(times: dict[str, list[float]], other: str, ours: str) -> list[float]:
    """The other's time over ours, run by run."""
    return [a / b for a, b in zip(times[other], times[ours], strict=True)]


def network(plain: bool) -> nn.Module:
    """The PreAct ResNet-18 for CIFAR-10; plain: laid out NCHW, F.softplus, BatchNorm as it is in every block."""
    torch.manual_seed(0)
    model = build_model("preact-resnet18")
    if plain:
        model.layout = torch.contiguous_format  # type: ignore[assignment]
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for block in model.modules():
            if hasattr(block, "bn1"):
                block.forward = MethodType(plain_forward, block)
    return model


def plain_forward(block: Any, x: Tensor) -> Tensor:
    """A block written down without a thought of speed."""
    out = F.softplus(block.bn1(x))
    skip = block.shortcut(out) if hasattr(block, "shortcut") else x
    out = block.conv2(F.softplus(block.bn2(block.conv1(out))))
    return out + skip


def updater(batch_size: int, amp: Amp | None) -> Callable[[str, int], None]:
    """An update after so many steps of an attack in a norm; amp None: the plain way, with adv-lib's APGD."""
    model = network(plain=amp is None).train()
    forward = autocast_model(model, CPU, amp or "off")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch_size, 3, 32, 32, generator=draws), torch.randint(0, 10, (batch_size,), generator=draws)

    standard = Scheme([])

    def update(norm: str, n_iter: int) -> None:
        [threat] = threats_of("cifar10", [norm], None)
        if amp is None:
            model.eval()
            x_adv = libraries.adv_lib(model, x, y, threat, n_iter)
            model.train()
        else:
            with eval_mode(model), no_param_grad(model):
                x_adv = apgd_module.apgd(forward, x, y, threat, n_iter).x_best
        optimizer.zero_grad()
        train.forward_backward(forward, standard, [(AdversarialBatch.clean(x_adv, 0), y)], 1 / batch_size, scaler)
        train.optimizer_step(optimizer, scaler, None)

    return update


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Seconds of the attacks' passes (forward, loss, backward to the images) inside."""
    spent: list[float] = []
    loss_and_grad = apgd_module.loss_and_grad

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = loss_and_grad(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return found

    apgd_module.loss_and_grad = timed  # type: ignore[attr-defined]
    try:
        yield spent
    finally:
        apgd_module.loss_and_grad = loss_and_grad  # type: ignore[attr-defined]


def rows_update(batch_size: int, runs: int) -> None:
    """An E-AT training step against the plain way, Linf and L1 in turn, each in a process of its own; and the memory it takes."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(runs):
        for way in WAYS:
            flags = [f"--update={way} {KEY_NORMS[number % 2]}", f"--batch_size={batch_size}"]
            command = [sys.executable, "-W", "ignore", __file__, *flags, f"--threads={torch.get_num_threads()}"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            times[way].append(float(told[0]))
            peaks[way].append(float(told[1]))
    for way, goal in (("float32", "1.6"), ("bf16", "3")):
        more = f"{median(times[way]):.1f} s, plain {median(times['plain']):.1f} s"
        row(f"E-AT training step, {way}", over(times, "plain", way), goal, more)
    for way in ("float32", "bf16"):
        more = f"{median(peaks[way]):.0f} MB, plain {median(peaks['plain']):.0f} MB"
        row(f"peak memory of a training step, {way}", over(peaks, "plain", way), "at least 1", more)


def print_update(batch_size: int, way: str, norm: str) -> None:
    """Seconds of an update, and peak MB over what the process had before any. Linux only."""
    if way != "plain":
        keep_freed_memory()  # as train.py does
    update = updater(batch_size, WAYS[way])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    update(norm, 1)  # the first one allocates
    print(seconds(partial(update, norm, 10)), resident("VmHWM") - before)


def resident(name: str) -> float:
    """MB of this process now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def rows_overhead(batch_size: int, runs: int) -> None:
    """Time of the attack over time of its passes, in one and the same run."""
    model = network(plain=False).eval().requires_grad_(False)
    x, y = torch.rand(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    for threat in threats_of("cifar10", list(NORMS), None):
        ratios = []
        for _ in range(runs):
            with timed_passes() as spent:
                whole = seconds(partial(apgd_module.apgd, model, x, y, threat, 4))
            ratios.append(whole / sum(spent))
        ratios = [round(ratio, 4) for ratio in ratios]
        goal = "at most 1.03" if threat.norm == "L1" else "at most 1.02"
        print(
            f"| attack over its bare passes, {threat.norm} | {median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) | {goal} | |",
            flush=True,
        )


def digits_network() -> nn.Module:
    """A PreAct ResNet-18 of width 16 that has learned the digits."""
    torch.manual_seed(0)
    model = build_model("preact-resnet18", in_channels=1, width=16)
    x, y = load_dataset("digits", "").train.pixels()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def rows_libraries(batch_size: int, runs: int) -> None:
    """One run of APGD on the cross-entropy: time, and the loss of the points that come back."""
    model = digits_network()
    x, y = load_dataset("digits", "").test.take(batch_size).pixels()

    def ours(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n_iter: int) -> Tensor:
        start = None if threat.norm == "L1" else random_start(x, threat)
        fraction = apgd_module.EVALUATION_TOP_FRACTION
        return apgd_module.apgd(model, x, y, threat, n_iter, delta_init=start, top_fraction=fraction).x_best

    for threat in threats_of("digits", list(NORMS), None):
        for n_iter in (10, 100):
            used = {n: f for n, f in libraries.ATTACKS.items() if threat.norm in libraries.NORMS_OF[n]} | {"ours": ours}
            works: dict[str, Work] = {name: partial(f, model, x, y, threat, n_iter) for name, f in used.items()}
            losses = {}
            for name, work in works.items():
                torch.manual_seed(0)
                losses[name] = float(F.cross_entropy(model(work()), y))
            times = rounds(works, runs)
            for name in used:
                if name != "ours":
                    lower = " (lower!)" if losses["ours"] < losses[name] - 5e-4 else ""
                    more = f"loss {losses['ours']:.3f}{lower}, {name} {losses[name]:.3f}; ours {median(times['ours']):.2f} s"
                    row(f"APGD {threat.norm}, {n_iter} steps, {name}", over(times, name, "ours"), "above 1", more)


def random_start(x: Tensor, threat: Threat) -> Tensor:
    """Where the libraries' runs start, from the same seed: a random direction, stretched to the ball's surface."""
    delta = 2 * torch.rand_like(x) - 1 if threat.norm == "Linf" else torch.randn_like(x)
    length = torch.linalg.vector_norm(delta.flatten(1), libraries.ORDER[threat.norm], dim=1)
    return threat.eps * delta / length.view(-1, *[1] * (x.dim() - 1))


def rows_projection(batch_size: int, runs: int) -> None:
    """L1 ball and box: after a step of the attack, whose points are sparse."""
    keep_freed_memory()  # as train.py and eval.py do; it speeds up both
    from adv_lib.attacks.auto_pgd import l1_projection

    for n, size, eps in ((128, 3072, 12.0), (16, 150_528, 255.0)):
        draws = torch.Generator().manual_seed(0)
        x, grad = torch.rand(n, size, generator=draws), torch.randn(n, size, generator=draws)
        radius = torch.full((n,), eps)
        delta = project_l1(0.1 * torch.randn(n, size, generator=draws), x, radius)
        k = size // 20
        delta += eps / k * grad.sign() * (grad.abs() >= grad.abs().topk(k, 1).values[:, -1:])
        exact = project_l1(delta.double(), x.double(), radius.double())
        error = float((project_l1(delta, x, radius) - exact).abs().max())
        works: dict[str, Work] = {
            "ours": partial(project_l1, delta, x, radius),
            "adv-lib": partial(l1_projection, x, delta, radius),
        }
        times = rounds(works, 4 * runs)
        more = f"{1000 * median(times['ours']):.1f} ms, adv-lib {1000 * median(times['adv-lib']):.1f} ms; error {error:.0e}"
        row(f"projection on L1 ball and box, {n} x {size}", over(times, "adv-lib", "ours"), "4", more)


def rows_batches(batch_size: int, runs: int) -> None:
    """An epoch of 10,000 random CIFAR-10-like images against torchvision's transforms and a DataLoader with two workers."""
    from torchvision import datasets, transforms

    n = 10_000
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,))

    class Images(datasets.CIFAR10):  # type: ignore[misc]
        def __init__(self) -> None:
            self.data, self.targets, self.target_transform = images.permute(0, 2, 3, 1).numpy(), labels.tolist(), None
            moves = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
            self.transform = transforms.Compose(moves)

    split = Split(images, labels, levels=255, padding=4, flip=True)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(Images(), batch_size, True, num_workers=2)
    works: dict[str, Work] = {
        "ours": lambda: list(BatchLoader(split, batch_size).epoch(0)),
        "theirs": lambda: list(loader),
    }
    times = rounds(works, runs)
    more = f"{1000 * median(times['ours']) * batch_size / n:.2f} ms a batch of {batch_size}"
    row("batches of CIFAR-10, torchvision and DataLoader", over(times, "theirs", "ours"), "4", more)


KINDS = {  # by the operations' own time, those of our softplus with what they call
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "softplus": ("aten::softplus", "aten::softplus_backward", "_Softplus", "_SoftplusBackward"),
    "BatchNorm": ("aten::native_batch_norm", "aten::native_batch_norm_backward", "aten::addcmul"),
}


def draw_picture(path: Path, batch_size: int) -> None:
    """Bars: CPU time of a training step with ten steps of Linf, by kind of operation, in three ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    for place, (name, amp) in enumerate(WAYS.items()):
        update = updater(batch_size, amp)
        if amp:
            keep_freed_memory()
        update("Linf", 10)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            update("Linf", 10)
        spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
        events = profiled.key_averages()
        for kind, names in KINDS.items():
            for event in (event for event in events if event.key in names):
                whole = event.key.startswith("_")
                spent[kind] += (event.cpu_time_total if whole else event.self_cpu_time_total) / 1e6
        spent["the rest"] = sum(event.self_cpu_time_total for event in events) / 1e6 - sum(spent.values())
        left = 0.0
        for kind, colour in zip(spent, ("#0072b2", "#e69f00", "#009e73", "#999999"), strict=True):
            axes.barh(place, spent[kind], left=left, color=colour, label=kind if place == 0 else None)
            left += spent[kind]
        print(name, {kind: round(value, 2) for kind, value in spent.items()}, flush=True)
    axes.set_yticks(range(len(WAYS)), ["the plain way", "float32", "--amp=bf16"])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"seconds of a training step, {batch_size} images, 10 steps of Linf, {torch.get_num_threads()} threads"
    )
    axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=110)


ROWS: dict[str, Callable[[int, int], None]] = {
    "update": rows_update,
    "overhead": rows_overhead,
    "libraries": rows_libraries,
    "projection": rows_projection,
    "batches": rows_batches,
}


def main() -> None:
    """Print the rows that were asked for."""
    parser = Parser(prog="benchmarks/speed.py", description=__doc__)
    add_flag(parser, "--rows", type=words, default=list(ROWS), help=f"which: {' '.join(ROWS)} (all)")
    add_flag(parser, "--runs", type=positive_int, default=5, help="paired runs (%(default)s)")
    add_flag(parser, "--batch_size", type=positive_int, default=128, help="images (%(default)s)")
    add_flag(parser, "--threads", type=positive_int, help="CPU threads (PyTorch's choice)")
    add_flag(parser, "--picture", help="draw where the time of a training step goes into this file, and nothing else")
    add_flag(
        parser, "--update", type=words, help="'WAY NORM': print the seconds and MB of one update, and nothing else"
    )
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"argument --rows: unknown {' '.join(sorted(unknown))}; choose from {' '.join(ROWS)}")
    if args.update and not (len(args.update) == 2 and args.update[0] in WAYS and args.update[1] in NORMS):
        parser.error(f"argument --update: takes 'WAY NORM', one of {' '.join(WAYS)} and one of {' '.join(NORMS)}")
    warnings.simplefilter("ignore")  # the other libraries' own
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.update:
        print_update(args.batch_size, *args.update)
    elif args.picture:
        draw_picture(Path(args.picture), args.batch_size)
    else:
        start = time.time()
        told = f"torch {torch.__version__}, {platform.machine()} {processor()}, {torch.get_num_threads()} threads"
        print(f"{told}, {time.strftime('%Y-%m-%d')}, median of {args.runs} paired runs (smallest to largest)")
        print(", ".join(f"{name} {version(name)}" for name in libraries.PACKAGES) + "\n")
        print("| what | ratio | goal | |\n|---|---|---|---|", flush=True)
        for name in args.rows:
            ROWS[name](args.batch_size, args.runs)
        print(f"\n{time.time() - start:.0f} s")


def processor() -> str:
    """Its name, where the system tells."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
