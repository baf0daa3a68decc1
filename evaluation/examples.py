"""Examples for the eye: which points of an evaluation tell most about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attacks.apgd import Model
from evaluation.report import Example
from evaluation.results import Evaluation
from evaluation.storage import ImageFile
from evaluation.threat_evaluator import Points, image_path


def worst_examples(
    model: Model, points: Points, result: Evaluation, folder: Path, class_names: Sequence[str], device: torch.device
) -> list[Example]:
    """Up to 8 points for the report: of each pattern of broken norms in turn the one with the surest wrong answer, from at most 250."""
    broken = {threat: log.broken for threat, log in result.logs.items()}
    if not broken or not torch.stack([*broken.values()]).any():
        return []
    looked_at = torch.stack([*broken.values()]).any(0).nonzero()[:250, 0]
    x = {"clean": points.x(looked_at)}
    for threat in broken:
        x[threat.norm] = torch.from_numpy(ImageFile(image_path(folder, threat)).images[looked_at.numpy()])
    with torch.no_grad():
        answers = {name: model(images.to(device)).float().softmax(1).max(1) for name, images in x.items()}
    patterns: dict[tuple[bool, ...], list[tuple[float, int]]] = {}
    for row, point in enumerate(looked_at.tolist()):
        wrong = {threat.norm: bool(gone[point]) for threat, gone in broken.items()}
        sure = max(float(answers[norm].values[row]) for norm in wrong if wrong[norm])
        patterns.setdefault(tuple(wrong.values()), []).append((sure, row))
    queues = [sorted(rows, reverse=True) for _, rows in sorted(patterns.items())]
    turns = [queue[turn][1] for turn in range(8) for queue in queues if turn < len(queue)][:8]

    def shown(name: str, row: int) -> tuple[Any, str, float]:
        sure, said = (part[row] for part in answers[name])
        return x[name][row].permute(1, 2, 0).numpy(), class_names[int(said)], float(sure)

    return [
        Example(
            class_names[int(points.y[looked_at[row]])],
            *shown("clean", row),
            {threat.norm: shown(threat.norm, row) for threat, gone in broken.items() if gone[looked_at[row]]},
        )
        for row in turns
    ]
