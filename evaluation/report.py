"""report.html: an evaluation as one page with its pictures inside, which opens from disk without a network."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attacks.network import Examples, Network
from attacks.norms import NORMS
from attacks.results import Evaluation, interval, remarks
from evaluation.images import image_path
from evaluation.statistics import radius_text, upper_bounds
from utils.pictures import as_text, picture_style
from utils.text import printable

COLOURS = {"clean": "#555555", "union": "#000000"}
SHOWN, LOOKED_AT = 8, 250
TALLEST = 100  # inches of a picture: 180 classes in five rows each can be told apart
LONGEST_NAME = 24  # characters of a class
ShownExample = dict[str, tuple[NDArray[Any], str]]
"""An example's images (H, W, C) in [0, 1], `clean` and by norm those that broke it, each with what the network says of it."""


def worst_examples(
    network: Network, examples: Examples, result: Evaluation, folder: Path, class_names: Sequence[str]
) -> list[ShownExample]:
    """Up to 8 for the page: of each pattern of broken norms in turn the one with the surest wrong answer, from at most 250."""
    broken = {threat: log.broken for threat, log in result.logs.items()}
    class_names = _short(class_names)
    if not any(bool(gone.any()) for gone in broken.values()):
        return []
    looked_at = torch.stack([*broken.values()]).any(0).nonzero()[:LOOKED_AT, 0]
    x = {"clean": examples.x(looked_at)}
    for threat in broken:
        x[threat.norm] = torch.from_numpy(np.load(image_path(folder, threat), mmap_mode="r")[looked_at.numpy()])
    answers = {name: _answers(network, images, class_names) for name, images in x.items()}
    wrong = {threat.norm: gone[looked_at] for threat, gone in broken.items()}
    rows = _in_turn(torch.stack([answers[norm][0] for norm in wrong]), torch.stack([*wrong.values()]))
    shown: list[ShownExample] = []
    for row in rows:
        headings = {norm: norm for norm in wrong if wrong[norm][row]}
        headings["clean"] = f"label {class_names[int(examples.y[looked_at[row]])]}"
        says = {name: f"{heading}\n{answers[name][1][row]}" for name, heading in headings.items()}
        shown.append({name: (x[name][row].permute(1, 2, 0).numpy(), words) for name, words in says.items()})
    return shown


def _short(class_names: Sequence[str]) -> list[str]:
    """As pictures show them."""
    return [as_text(name, LONGEST_NAME) for name in class_names]


def _answers(network: Network, x: Tensor, class_names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """How sure the network is of its answers to x (B, C, H, W), (B,), and the answers in words."""
    with torch.no_grad():
        confidence, predicted = network.model(x.to(network.device)).float().cpu().softmax(1).max(1)
    pairs = zip(predicted.tolist(), confidence.tolist(), strict=True)
    return confidence, [f"{class_names[k]}, {100 * probability:.0f} %" for k, probability in pairs]


def _in_turn(confidence: Tensor, wrong: Tensor) -> list[int]:
    """Up to 8 of B: of each pattern of wrong (V, B) norms in turn the one with the highest confidence (V, B) in a wrong answer."""
    surest = torch.where(wrong, confidence, 0).amax(0).tolist()
    patterns: dict[tuple[bool, ...], list[tuple[float, int]]] = {}
    for row, pattern in enumerate(wrong.T.tolist()):
        patterns.setdefault(tuple(pattern), []).append((surest[row], row))
    queues = [sorted(rows, reverse=True) for _, rows in sorted(patterns.items())]
    return [queue[turn][1] for turn in range(SHOWN) for queue in queues if turn < len(queue)][:SHOWN]


def write_report(
    path: Path,
    content: dict[str, Any],
    labels: Sequence[int],
    class_names: Sequence[str],
    examples: Sequence[ShownExample],
) -> None:
    """Write the page from eval.json's content, all labels (N,) and some examples."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    with picture_style():
        bounds = upper_bounds(content)
        pictures = [_classes(content["outcomes"], bounds, labels, _short(class_names))]
        if "curve" in content:
            eps = {norm: about["eps"] for norm, about in content["norms"].items()}
            pictures.append(_curve(content["curve"], eps, bounds))
        if examples:
            pictures.append(_grid(examples, list(content["norms"])))
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value, len(value)) if isinstance(value, str) else value,
    )
    command = "python " + shlex.join(content["environment"]["command"])
    text = page.get_template("report.html").render(
        content,
        title=page_title(content),
        pictures=pictures,
        command=command,
        interval=interval,
        radius_text=radius_text,
        remarks=remarks,
    )
    path.write_text(text, encoding="utf-8")


def page_title(content: Mapping[str, Any]) -> str:
    """Network and data set in a few words: its architecture or function, and the last part of --model_name, without folders and digest."""
    settings, spec = content["settings"], content.get("network", {})
    file = settings["model_name"].partition("#")[0].rpartition("/")[2]
    made = spec.get("function") or ("" if spec.get("arch") == "robustbench" else spec.get("arch", ""))
    made = made.rpartition("/")[2]
    name = f"{made} ({printable(file, 60)})" if made not in ("", file) else printable(file, 60)
    return f"{name} on {settings['dataset']}: robust accuracy"


def _classes(
    outcomes: dict[str, list[int]], bounds: Container[str], labels: Sequence[int], class_names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of each class in bars; `bounds`: which are upper bounds."""
    y, places, width = np.array(labels), np.arange(len(class_names)), 0.8 / len(outcomes)
    counts = [int((y == k).sum()) for k in places]
    # As narrow as a phone, and longer for more classes.
    figure = _figure(5, min(1.2 + len(class_names) * (0.15 + 0.08 * len(outcomes)), TALLEST))
    axes = figure.subplots()
    for i, (name, values) in enumerate(outcomes.items()):
        lengths = [100 * np.mean(np.array(values)[y == k]) if counts[k] else np.nan for k in places]
        label = f"{name} (upper bound)" if name in bounds else name
        axes.barh(places + i * width, lengths, width, label=label, color=_colour(name))
    names = [f"{name}\n{n} images" for name, n in zip(class_names, counts, strict=True)]
    axes.set_yticks(places + 0.4 - width / 2, names)
    axes.set(xlabel="accuracy (%)", xlim=(0, 100), ylim=(len(places) - 0.1 - width / 2, -0.1 - width / 2))
    figure.legend(ncols=2, loc="outside upper center", frameon=False)
    return _picture("Accuracy of each class", "Bars of classes with few images mean little.", figure)


def _curve(curve: dict[str, list[list[float]]], eps: Mapping[str, float], bounds: Container[str]) -> dict[str, Any]:
    """Accuracy against radius, a figure a norm; eps: the evaluation's; `bounds`: which norms' accuracy is an upper bound there too."""
    figures = []
    for norm, rows in curve.items():
        figures.append(_figure(3, 2.8))  # three fit in a row of the page
        axes = figures[-1].subplots()
        radii, accuracy = zip(*rows, strict=True)
        axes.plot(radii, accuracy, marker="o", color=_colour(norm))
        axes.axvline(eps[norm], color="#999999", linestyle=":", label="the evaluation's radius")
        axes.set(title=f"{norm} (upper bound)" if norm in bounds else norm, ylim=(0, 100))
        axes.set(xlabel="radius (pixels in [0, 1])", ylabel="robust accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    text = (
        "At the dotted radius all attacks of the evaluation; elsewhere one APGD-CE, an upper bound. "
        "What breaks at a radius is broken above it."
    )
    return _picture("Security curves", text, *figures)


def _grid(examples: Sequence[ShownExample], norms: Sequence[str]) -> dict[str, Any]:
    """A row an example: clean, and for each norm the image that broke it and the difference, magnified."""
    columns = 1 + 2 * len(norms)
    figure = _figure(1.6 * columns, 1.95 * len(examples))
    for row, example in zip(figure.subplots(len(examples), columns, squeeze=False), examples, strict=True):
        for axes in row:
            axes.set_axis_off()
        clean = example["clean"][0]
        _show(row[0], *example["clean"])
        for left, right, norm in zip(row[1::2], row[2::2], norms, strict=True):
            if norm not in example:
                left.text(0.5, 0.5, f"not broken\nin {norm}", ha="center", va="center", color="#666666")
                continue
            difference = example[norm][0] - clean
            largest = max(float(np.abs(difference).max()), 1e-12)
            _show(left, *example[norm])
            _show(right, 0.5 + difference / largest / 2, f"difference\nx {0.5 / largest:.3g}")
    text = (
        "Left the clean image with its label; then for each norm the image that broke it, what the network says of it and how sure it is, "
        "and the difference around grey, magnified by the factor above it. "
        "Chosen: of each pattern of broken norms those with the surest wrong answers."
    )
    return _picture("Examples", text, figure)


def _colour(name: str) -> str | None:
    return NORMS[name].colour if name in NORMS else COLOURS.get(name)


def _show(axes: Any, image: NDArray[Any], title: str) -> None:
    grey_or_rgb = image.squeeze(-1) if image.shape[-1] == 1 else image
    axes.imshow(grey_or_rgb, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here, since importing it takes a second

    return Figure(figsize=(width, height), layout="constrained")


def _picture(title: str, text: str, *figures: Any) -> dict[str, Any]:
    """What the page shows under a heading."""
    pngs = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pngs.append(base64.b64encode(buffer.getvalue()).decode())
    return {"title": title, "text": text, "pngs": pngs}
