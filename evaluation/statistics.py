"""An evaluation as files tell it: eval.json's content, paired differences between two."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from attacks.norms import NORMS
from attacks.results import AttackLog, Evaluation
from attacks.threat import Threat


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """eval.json's part that the attacks know (docs/evaluation.md says what each field is)."""
    outcomes = {name: values for name, values in evaluation.outcomes().items() if name != "average"}
    content = {
        "accuracy": evaluation.accuracies(),
        "warnings": evaluation.warnings,
        "clean_not_finite": [] if evaluation.clean_not_finite is None else _numbers(evaluation.clean_not_finite),
        "norms": {threat.norm: _norm_json(threat, log) for threat, log in evaluation.logs.items()},
        "outcomes": {name: values.int().tolist() for name, values in outcomes.items()},
    }
    curve = {threat.norm: rows for threat, rows in evaluation.curve.items()}
    return content | ({"curve": curve} if curve else {})


def _norm_json(threat: Threat, log: AttackLog) -> dict[str, Any]:
    columns = {
        "name": map(str, log.runs),
        "attacked": (log.passes > 0).sum(0).tolist(),
        "broken": [int((log.broken_by == number).sum()) for number in range(len(log.runs))],
        "forward_passes": log.passes.sum(0).tolist(),
    }
    return {
        "eps": threat.eps,
        "runs": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        "counts": log.counts,
        "not_finite": _numbers(log.not_finite),
        "broken_by_run": [None if number < 0 else number for number in log.broken_by.tolist()],
        "forward_passes": log.passes.sum(1).tolist(),
    }


def _numbers(chosen: Tensor) -> list[int]:
    """Which of (N,) bool are true."""
    found: list[int] = chosen.nonzero()[:, 0].tolist()
    return found


def radius_text(norm: str, eps: float) -> str:
    """A radius for pixels in [0, 1]: 8/255 in a norm that bounds each pixel alone, where that is exact, else 0.5."""
    levels = round(eps * 255, 6)
    in_levels = norm in NORMS and NORMS[norm].per_pixel and levels == round(levels)
    return f"{levels:.0f}/255" if in_levels else f"{eps:g}"


def upper_bounds(content: Mapping[str, Any]) -> set[str]:
    """The outcomes that eval.json calls upper bounds, and those of fast attacks in a file of an earlier version."""
    rows, settings = (
        {} if not isinstance(content.get(key), dict) else content[key] for key in ("accuracy", "settings")
    )
    fast = settings.get("attacks") == "fast"
    return {name for name, row in rows.items() if isinstance(row, dict) and (row.get("upper_bound") or fast)} - {
        "clean"
    }


def paired(
    ours: dict[str, list[int]], theirs: dict[str, list[int]], bounds: Container[str] = ()
) -> dict[str, dict[str, float]]:
    """Differences of two evaluations' outcomes, 0 or 1 an example: ours minus theirs and the 95 % interval, in percentage points.

    The interval is the normal one of the mean of the differences. `bounds`: outcomes of which one evaluation has but an upper bound.
    Raises ValueError if the examples differ in number.
    """
    rows: dict[str, dict[str, float]] = {}
    for name in [name for name in ours if name in theirs]:
        n = len(ours[name])
        if len(theirs[name]) != n:
            raise ValueError(
                f"it has {len(theirs[name])} images, this evaluation {n}: a paired difference needs the same"
            )
        difference = np.array(ours[name], float) - np.array(theirs[name], float)
        half = 1.96 * float(np.std(difference, ddof=1)) / n**0.5 if n > 1 else 1.0
        mean = float(difference.mean())
        figures = {"difference": mean, "low": mean - half, "high": mean + half}
        rows[name] = {key: round(100 * value, 2) for key, value in figures.items()}
        if name in bounds:
            rows[name]["upper_bound"] = True
    return rows


def difference_table(rows: dict[str, dict[str, float]], other: str) -> str:
    """Paired differences in percentage points with their 95 % intervals, one line each."""
    lines = [f"difference to {other}, the same images, with 95 % interval"]
    for name, row in rows.items():
        bound = "   of upper bounds" if row.get("upper_bound") else ""
        lines.append(f"  {name:<26}{row['difference']:+7.2f}     [{row['low']:+6.1f}, {row['high']:+6.1f}]{bound}")
    return "\n".join(lines)
