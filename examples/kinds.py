"""Fine-tuning for a task of one's own: CIFAR-10's ten classes as four, with a new last layer; train.py's and eval.py's flags.

python examples/kinds.py train --finetune_model --model_name=pretr_Linf.pth --attack=apgd --l_norms='Linf L1' --head_lr=10
python examples/kinds.py eval --model_name=runs/RUN/ep_3.pth
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere

import torch

import eval as eval_script
import train
from data import DATASETS, Dataset, DatasetSpec

KINDS = {
    "vehicle": ("airplane", "automobile", "ship", "truck"),
    "pet": ("cat", "dog"),
    "hoofed": ("deer", "horse"),
    "other animal": ("bird", "frog"),
}


def load(name: str, *args: Any) -> Dataset:
    """CIFAR-10 with other labels."""
    cifar10 = DATASETS["cifar10"].load("cifar10", *args)
    kind = [next(i for i, names in enumerate(KINDS.values()) if name in names) for name in cifar10.class_names]
    train_, test = (replace(split, labels=torch.tensor(kind)[split.labels]) for split in (cifar10.train, cifar10.test))
    return replace(cifar10, name=name, train=train_, test=test, class_names=tuple(KINDS))


DATASETS["kinds"] = DatasetSpec("kinds", "CIFAR-10's images, four kinds", load, DATASETS["cifar10"].radii, (3, 32, 32))

if __name__ == "__main__":
    script, *flags = sys.argv[1:]
    {"train": train, "eval": eval_script}[script].main(["--dataset=kinds", *flags])
