"""python benchmarks/quick_picture.py runs/RUN/ep_15.pth: docs/quick.png, when the quick attacks drop runs, on 500 test images of digits."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

from attacks import AttackPlan, robust_accuracy
from config import threats_of
from data import load_dataset
from models.pretrained import load_model

ROOT = Path(__file__).parents[1]
COLOURS = {"standard": "0.6", "quick": "#0072b2"}

torch.set_num_threads(1)
model = load_model(sys.argv[1], "models", "digits").model.eval()
x, y = load_dataset("digits", "").test.take(500).pixels()
threats = threats_of("digits", ("Linf", "L2", "L1"), None)
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
fig, panels = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained", sharey=True)
for attacks, colour in COLOURS.items():
    result = robust_accuracy(model, x, y, threats, AttackPlan(attacks))
    for axes, threat in zip(panels, threats, strict=True):
        log = result.logs[threat]
        steps = range(int(log.passes.max()))
        going_on = [float((log.passes > step).sum()) / len(y) for step in steps]
        axes.fill_between(steps, going_on, step="post", color=colour, alpha=0.5 if attacks == "quick" else 0.4)
        total = float(log.passes.sum()) / len(y)
        accuracy = 100 * float(result.robust(threat).double().mean())
        axes.plot([], [], color=colour, linewidth=6, label=f"{attacks}: {total:.0f} passes an image, {accuracy:.1f} %")
        axes.set_title(str(threat))
        axes.set_xlabel("step of a run")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
panels[0].set_ylabel("runs that go on, per image")
panels[0].set_ylim(0, 14)
fig.savefig(ROOT / "docs" / "quick.png", dpi=110)
