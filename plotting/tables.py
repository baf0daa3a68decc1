"""Tables of networks side by side, in Markdown or LaTeX: accuracy, and paired differences to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.statistics import radius_text
from plotting.comparison import Group, cell, latex, markdown
from plotting.networks import Network

Lines = Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]
# How a table is written, its file's suffix, what a line of text begins with.
KINDS: dict[str, tuple[Lines, str, str]] = {
    "markdown": (markdown, "md", ""),
    "latex": (latex, "tex", "% "),
}


def tables(networks: Sequence[Network], kind: str, baseline: str | None) -> str:
    """A table for all networks of the same evaluation, and one of paired differences to the baseline, a label."""
    lines, _, comment = KINDS[kind]
    evaluations: dict[tuple[str, int, str], list[Network]] = {}
    for network in networks:
        evaluations.setdefault(network.evaluation, []).append(network)
    parts = []
    for (setting, n, attacks), same in evaluations.items():
        said = f"{setting}; the first {n} test images, {attacks}. Accuracy in %, {spread(same)}."
        parts += [f"{comment}{said}", "", *lines(*accuracy_table(same)), ""]
        base = next((network for network in same if network.label == baseline), None)
        others = [network for network in same if base and network is not base and network.pairs(base)]
        if base and others:
            said = f"Paired differences in points{over([*others, base])}."
            names = columns([*others, base])
            heads, rows = difference_table(others, base, names)
            rows = [[*row, str(len(other.pairs(base)))] for row, other in zip(rows, others, strict=True)]
            parts += [f"{comment}{said}", "", *lines([*heads, "pairs"], rows), ""]
    if len(evaluations) > 1:
        parts.insert(
            0, f"{comment}Evaluations differ in data set, radii, attacks, their settings or images: a table for each.\n"
        )
    return "\n".join(parts)


def accuracy_table(networks: Sequence[Network]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a network each, with its number of seeds where one has several."""
    names, several = columns(networks), any(len(network.points) > 1 for network in networks)
    radii = networks[0].radii
    heads = [f"{name} {radius_text(name, radii[name])}" if name in radii else name for name in names]
    rows = [
        [network.label, *(figure(network, name) for name in names), *[str(len(network.points))] * several]
        for network in networks
    ]
    return ["network", *heads, *["seeds"] * several], rows


def difference_table(networks: Sequence[Group], base: Group, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a network each."""
    rows = [[network.label, *(cell(network.difference(base, name), "+") for name in names)] for network in networks]
    return [f"minus {base.label}", *names], rows


def columns(networks: Sequence[Network]) -> list[str]:
    """What there is a figure of for all of them."""
    return [name for name in networks[0].names() if all(name in network.names() for network in networks)]


def figure(network: Network, name: str) -> str:
    """Accuracy with its 95 % interval, or over several seeds with the standard deviation; ≤ for an upper bound."""
    bound = "≤ " * any(point.rows[name].get("upper_bound") for point in network.points)
    if len(network.points) > 1:
        return bound + cell(network.accuracy(name))
    value, low, high = network.interval(name)
    return f"{bound}{value:.1f} [{low:.1f}, {high:.1f}]"


def spread(networks: Sequence[Network]) -> str:
    """What stands behind figures, in words."""
    kinds = {len(network.points) > 1 for network in networks}
    texts = {False: "with 95 % interval", True: "mean ± standard deviation over the seeds"}
    bound = "; ≤: an upper bound" * any("≤" in text for row in accuracy_table(networks)[1] for text in row)
    return " or ".join(texts[several] for several in sorted(kinds)) + bound


def over(groups: Sequence[Group]) -> str:
    """What is known of the errors of differences, in words."""
    several = any(len(group.results) > 1 for group in groups)
    known = all(result.outcomes for group in groups for result in group.results.values())
    kinds = " and ".join(["seeds"] * several + ["images"] * known)
    return f", ± standard error over {kinds}" if kinds else " (the outcomes of images, and so errors, are not known)"
