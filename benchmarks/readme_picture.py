"""python benchmarks/readme_picture.py: docs/readme.png, from the tables of README (CIFAR-10) and docs/schemes/digits.jsonl."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
NORMS = ["Linf 8/255", "L2 0.5", "L1 12", "union"]
START, TUNED = [34, 51, 16, 16], [30, 50, 39, 30]  # per cent of the first 100 test images
SHOWN = ["eat", "sat", "avg", "max", "msd", "ramp"]
BLUE, ORANGE = "#0072b2", "#d55e00"


def wilson(percent: float, n: int = 100) -> tuple[float, float]:
    """How far the 95 % interval of a share of n images reaches below and above it, in points."""
    rate, spread = percent / 100, 1.96**2 / n
    middle, half = rate + spread / 2, (spread * rate * (1 - rate) + spread**2 / 4) ** 0.5
    return percent - 100 * (middle - half) / (1 + spread), 100 * (middle + half) / (1 + spread) - percent


plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
for offset, values, label, colour in (
    (-0.2, START, "Linf-robust start", "0.65"),
    (0.2, TUNED, "then 3 epochs of E-AT", BLUE),
):
    errors = list(zip(*(wilson(value) for value in values), strict=True))
    bars = left.bar([i + offset for i in range(4)], values, 0.38, yerr=errors, ecolor="0.3", label=label, color=colour)
    for bar, value in zip(bars, values, strict=True):
        left.text(bar.get_x() + 0.19, 1.5, value, color="white", ha="center", fontsize=9)
left.set_xticks(range(4), NORMS)
left.set_ylim(0, 75)
left.set_ylabel("robust accuracy (%)")
left.set_title("CIFAR-10: from one norm to all, 100 test images, 95 % interval", fontsize=10)
left.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)

cost, union = defaultdict(list), defaultdict(list)
for line in (DOCS / "schemes" / "digits.jsonl").read_text().splitlines():
    row = json.loads(line)
    name, flags = row["scheme"], row["train"]
    if name in SHOWN and row["epochs"] == 30 and flags[-1] == f"--multinorm={name}":
        cost[name].append(sum(row["passes"].values()))
        union[name].append(row["accuracy"]["union"])
for name in SHOWN:
    x, y, colour = mean(cost[name]), mean(union[name]), ORANGE if name == "eat" else "0.45"
    right.errorbar(x, y, stdev(union[name]), fmt="o", color=colour)
    right.annotate("E-AT" if name == "eat" else name.upper(), (x, y), (7, 4), textcoords="offset points", color=colour)
right.set_xlim(0, 80)
right.set_ylim(31, 52)
right.set_xlabel("network passes per training image, forward + backward")
right.set_ylabel("union (%)")
right.set_title("Digits from scratch: six schemes, 5 seeds each", fontsize=10)
fig.savefig(DOCS / "readme.png", dpi=110)
