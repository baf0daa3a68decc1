"""Examples for the eye: which images of an evaluation tell most about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attacks.evaluator import Examples, Network
from attacks.results import Evaluation
from evaluation.report import ShownExample, ShownImage
from evaluation.storage import ImageFile, image_path

SHOWN, LOOKED_AT = 8, 250


def worst_examples(
    network: Network, examples: Examples, result: Evaluation, folder: Path, class_names: Sequence[str]
) -> list[ShownExample]:
    """Up to 8 for the report: of each pattern of broken norms in turn the one with the surest wrong answer, from at most 250."""
    broken = {threat: log.broken for threat, log in result.logs.items()}
    if not broken or not torch.stack([*broken.values()]).any():
        return []
    looked_at = torch.stack([*broken.values()]).any(0).nonzero()[:LOOKED_AT, 0]
    x = {"clean": examples.x(looked_at)}
    for threat in broken:
        x[threat.norm] = torch.from_numpy(ImageFile(image_path(folder, threat)).images[looked_at.numpy()])
    with torch.no_grad():
        answers = {
            name: network.model(images.to(network.device)).float().softmax(1).max(1) for name, images in x.items()
        }

    def shown(name: str, row: int) -> ShownImage:
        confidence, predicted = (part[row] for part in answers[name])
        return ShownImage(x[name][row].permute(1, 2, 0).numpy(), class_names[int(predicted)], float(confidence))

    wrong = {threat.norm: gone[looked_at] for threat, gone in broken.items()}
    return [
        ShownExample(
            class_names[int(examples.y[looked_at[row]])],
            shown("clean", row),
            {norm: shown(norm, row) for norm, gone in wrong.items() if gone[row]},
        )
        for row in _in_turn({norm: answers[norm].values for norm in wrong}, wrong)
    ]


def _in_turn(confidence: Mapping[str, Tensor], wrong: Mapping[str, Tensor]) -> list[int]:
    """Up to 8 rows: of each pattern of wrong (B,) norms in turn the one with the highest confidence (B,) in a wrong answer."""
    patterns: dict[tuple[bool, ...], list[tuple[float, int]]] = {}
    for row in range(len(next(iter(wrong.values())))):
        pattern = {norm: bool(gone[row]) for norm, gone in wrong.items()}
        surest = max(float(confidence[norm][row]) for norm in pattern if pattern[norm])
        patterns.setdefault(tuple(pattern.values()), []).append((surest, row))
    queues = [sorted(rows, reverse=True) for _, rows in sorted(patterns.items())]
    return [queue[turn][1] for turn in range(SHOWN) for queue in queues if turn < len(queue)][:SHOWN]
