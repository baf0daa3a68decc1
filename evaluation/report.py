"""report.html: an evaluation as one page with its pictures inside, which opens from disk without a network."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.norms import NORMS

COLOURS = {"clean": "#555555", "union": "#000000"}


@dataclass(frozen=True)
class ShownImage:
    """An image (H, W, C) in [0, 1], the class that the network predicts, and its probability."""

    image: NDArray[Any]
    predicted: str
    confidence: float


@dataclass(frozen=True)
class ShownExample:
    """An example's label, clean image, and those that broke it, by norm."""

    label: str
    clean: ShownImage
    adversarial: dict[str, ShownImage]


def write_report(
    path: Path,
    content: dict[str, Any],
    labels: Sequence[int],
    class_names: Sequence[str],
    examples: Sequence[ShownExample],
) -> None:
    """Write the page from eval.json's content, all labels (N,) and some examples."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    settings, env = content["settings"], content["environment"]
    pictures = [_classes(content["outcomes"], labels, class_names)]
    if "curve" in content:
        pictures.append(_curve(content["curve"]))
    if examples:
        pictures.append(_grid(examples, list(content["norms"])))
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text = page.get_template("report.html").render(
        title=f"Robust accuracy of {settings['model_name']}",
        subtitle=f"the first {settings['n_ex']} test points of {settings['dataset']}; "
        f"{settings['attacks']} attacks, {settings['n_iter']} steps a run",
        warnings=content["warnings"],
        accuracy=content["accuracy"],
        differences=content.get("difference_to_baseline"),
        norms=content["norms"],
        pictures=pictures,
        command="python " + shlex.join(env["command"]),
        made=f"{env['started']}, {content['seconds']:.0f} s on {env['device']}, torch {env['packages']['torch']}, commit {env['commit']}",
    )
    path.write_text(text)


def _classes(outcomes: dict[str, list[int]], labels: Sequence[int], class_names: Sequence[str]) -> dict[str, str]:
    """Accuracy of each class in bars."""
    from matplotlib.figure import Figure

    y = np.array(labels)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(outcomes)
    for i, (name, values) in enumerate(outcomes.items()):
        heights = [
            100 * np.mean(np.array(values)[y == k]) if (y == k).any() else np.nan for k in range(len(class_names))
        ]
        axes.bar(np.arange(len(class_names)) + i * width, heights, width, label=name, color=_colour(name))
    counts = [int((y == k).sum()) for k in range(len(class_names))]
    axes.set_xticks(
        np.arange(len(class_names)) + 0.4 - width / 2,
        [f"{c}\n{n} points" for c, n in zip(class_names, counts, strict=True)],
    )
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    axes.legend(ncols=len(outcomes), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return _picture(figure, "Accuracy of each class", "Bars of classes with few points mean little.")


def _curve(curve: dict[str, list[list[float]]]) -> dict[str, str]:
    """Accuracy against radius."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (norm, rows) in zip(
        np.atleast_1d(figure.subplots(1, len(curve), sharey=True)), curve.items(), strict=True
    ):
        radii, accuracy = zip(*rows, strict=True)
        axes.plot(radii, accuracy, marker="o", color=_colour(norm))
        axes.axvline(radii[len(radii) // 2], color="#999999", linestyle=":", label="the evaluation's radius")
        axes.set(title=norm, xlabel="radius (pixels in [0, 1])", ylim=(0, 100))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("robust accuracy (%)")
    figure.axes[0].legend(frameon=False)
    text = (
        "At the dotted radius all attacks of the evaluation; elsewhere one APGD-CE, an upper bound. "
        "What breaks at a radius is broken above it."
    )
    return _picture(figure, "Security curves", text)


def _grid(examples: Sequence[ShownExample], norms: Sequence[str]) -> dict[str, str]:
    """A row an example: clean, and for each norm the image that broke it and the difference, magnified."""
    from matplotlib.figure import Figure

    columns = 1 + 2 * len(norms)
    figure = Figure(figsize=(1.6 * columns, 1.95 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for row, example in zip(grid, examples, strict=True):
        for axes in row:
            axes.set_axis_off()
        _show(row[0], example.clean.image, f"label {example.label}\n{_answer(example.clean)}")
        for i, norm in enumerate(norms):
            if norm not in example.adversarial:
                row[2 * i + 1].text(0.5, 0.5, f"not broken\nin {norm}", ha="center", va="center", color="#666666")
                continue
            found = example.adversarial[norm]
            difference = found.image - example.clean.image
            largest = max(float(np.abs(difference).max()), 1e-12)
            _show(row[2 * i + 1], found.image, f"{norm}\n{_answer(found)}")
            _show(row[2 * i + 2], 0.5 + difference / largest / 2, f"difference\nx {0.5 / largest:.3g}")
    text = (
        "Left the clean image with its label; then for each norm the image that broke it, what the network says of it and how sure it is, "
        "and the difference around grey, magnified by the factor above it. "
        "Chosen: of each pattern of broken norms those with the surest wrong answers."
    )
    return _picture(figure, "Examples", text)


def _colour(name: str) -> str | None:
    return NORMS[name].colour if name in NORMS else COLOURS.get(name)


def _answer(shown: ShownImage) -> str:
    return f"{shown.predicted}, {100 * shown.confidence:.0f} %"


def _show(axes: Any, image: NDArray[Any], title: str) -> None:
    axes.imshow(
        image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_title(title, fontsize=8)


def _picture(figure: Any, title: str, text: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return {"title": title, "text": text, "png": base64.b64encode(buffer.getvalue()).decode()}
