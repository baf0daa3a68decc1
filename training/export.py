"""--export: a run's network as FILE.safetensors, and beside it README.md, a model card for the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attacks.multinorm import SCHEMES
from config import TrainConfig
from utils.checkpoint import load_tensors, write_atomic
from utils.resume import ResumePoint, run_id
from utils.run_folder import json_lines, read_json
from utils.safetensors_files import SUFFIX, safetensors_bytes
from utils.text import markdown, printable

CARD = "README.md"
TOLD = ("spec", "dataset", "threats", "image_size", "epoch")  # what a checkpoint says of itself


def check_export(config: TrainConfig, run: ResumePoint | None) -> None:
    """Raises ValueError unless the network of `run` (None: a new one) can be exported as asked for: nothing is overwritten."""
    if config.export is None:
        return
    path = Path(config.export)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} has to end in {SUFFIX}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}, make it first")
    if run and _is_of(path, run.folder):  # by this run, when it was interrupted between the two files or after them
        return
    for each in (path, path.parent / CARD):
        if each.exists():
            raise ValueError(f"{each} exists, and is not overwritten: name a file in another folder")


def export_run(config: TrainConfig, run: Path) -> None:
    """With --export write file and card, each whole or not at all, once the run's checkpoints are written. Raises ValueError, OSError.

    The network is that of best.pth with --select, else the one after the last epoch; never the averaged one of --ema.
    """
    if config.export is None:
        return
    path = Path(config.export)
    checkpoint = run / ("best.pth" if config.select else f"ep_{config.epochs}.pth")
    check_export(config, ResumePoint(run, None))
    content = load_tensors(checkpoint)
    about = {key: content[key] for key in TOLD if key in content}
    if not _is_of(path, run):
        write_atomic(safetensors_bytes(content["state_dict"], about | {"run": run_id(run)}), path)
    if not (path.parent / CARD).exists():
        write_atomic(_card(config, run, path, about).encode(), path.parent / CARD)
    print(f"exported {checkpoint} to {path}, with {path.parent / CARD}", flush=True)


def _is_of(path: Path, run: Path) -> bool:
    """Is there an exported network of this run?"""
    with suppress(ValueError):  # somebody else's file
        return path.is_file() and (number := run_id(run)) is not None and load_tensors(path).get("run") == number
    return False


def _card(config: TrainConfig, run: Path, path: Path, about: Mapping[str, Any]) -> str:
    """The model card."""
    env, spec = read_json(run / "env.json"), about["spec"]
    name = f"{spec['function']}@{path.name}" if spec.get("arch") == "function" else path.name
    radii = ", ".join(f"{norm} {eps:g}" for norm, eps in about["threats"].items()) or "none, standard training"
    scheme = f"{config.multinorm}: {SCHEMES[config.multinorm].summary}" if config.multinorm else "none"
    start = config.model_name if config.finetune_model else "random weights"
    network = ", ".join(f"{key} {value}" for key, value in spec.items())
    size = f", images of {about['image_size']} pixels" if "image_size" in about else ""
    facts: list[tuple[str, Any]] = [("network", network), ("data set", f"{about['dataset']}{size}")]
    facts += [("norms and radii", radii), ("scheme", scheme), ("started from", start)]
    facts.append(("epochs", f"{about['epoch']} of {config.epochs}"))
    versions = ", ".join(f"{key} {value}" for key, value in env["packages"].items())
    facts += [("commit", env["commit"]), ("versions", f"Python {env['python']}, {versions}"), ("device", env["device"])]
    rows = "\n".join(f"| {key} | {markdown(value)} |" for key, value in facts)
    command = f"python {shlex.join(map(str, env['command']))}"
    return f"""---
# license: yours to choose, such as mit; without this line nobody may use the weights
library_name: pytorch
pipeline_tag: image-classification
tags: [pytorch, image-classification, adversarial-robustness, multi-norm-robustness]
---
# {markdown(path.stem)}
An image classifier, trained to be robust in several norms. Radii are for pixels in [0, 1].

| | |
|---|---|
{rows}

Training command:
```sh
{printable(command, 10_000)}
```

## Accuracy
{_accuracy(run, about["epoch"])}

## Use
With the program that trained it, in its folder, and the file beside it or as `hf:USER/REPO/{path.name}`:
```sh
python eval.py --model_name={printable(shlex.quote(name))}
```
```python
from models.pretrained import load_model

model = load_model({printable(repr(name))}, ".", {about["dataset"]!r}).model.eval()  # logits of images (B, C, H, W) in [0, 1]
```
"""


def _accuracy(run: Path, epoch: int) -> str:
    """What is known of the network after this epoch: --final_eval's table, else that of --eval_freq."""
    if (run / "eval.json").exists():
        return _table(
            read_json(run / "eval.json")["accuracy"], "The standard evaluation (APGD-CE and APGD-T, 100 steps)"
        )
    records = json_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else ()
    found = [record["eval"]["test"] for record in records if record.get("epoch") == epoch and "eval" in record]
    quick = "The quick evaluation on the way: fewer attacks on few images, so figures may be too high"
    return _table(found[-1], quick) if found else "It was not evaluated."


def _table(accuracy: Mapping[str, Mapping[str, Any]], title: str) -> str:
    rows = (
        f"| {markdown(name)} | {row['accuracy']:.1f} | {row['low']:.1f} to {row['high']:.1f} |"
        for name, row in accuracy.items()
    )
    points = next(iter(accuracy.values()))["points"]
    head = f"{title}; the first {points} test images, accuracy in %.\n\n| attack | accuracy | 95 % interval |\n|---|---|---|\n"
    return head + "\n".join(rows)
