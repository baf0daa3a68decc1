"""Networks of timm and torchvision: trained, resumed, evaluated; their published weights; weights of theirs from any file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eval as eval_script
import models.libraries
import train
from data import DATASETS, Dataset, DatasetSpec, Split
from models import build_model, new_spec
from models.from_file import NetworkFlags
from models.libraries import LIBRARIES
from models.pretrained import load_model
from training.optim import layer_factors
from utils.checkpoint import load_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
import torchvision

IMAGENET = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
RGB = (3, 32, 32)


@pytest.fixture(autouse=True)
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 32 x 32 RGB images in three classes, here alone."""
    monkeypatch.chdir(tmp_path)

    def load(*_: object) -> Dataset:
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(256, (16, *RGB), dtype=torch.uint8, generator=draws)
        split = Split(images, torch.arange(16) % 3, levels=255, padding=2, flip=True)
        return Dataset("colours", split, split, ("red", "green", "blue"))

    radii = DATASETS["cifar10"].radii
    monkeypatch.setitem(DATASETS, "colours", DatasetSpec("colours", "made up", load, radii, RGB))


LARGE = ["timm:convnext_tiny", "timm:vit_small_patch16_224", "timm:xcit_small_12_p16_224", "timm:resnet50"]
LARGE += ["torchvision:resnet50"]
FLAGS = ["--dataset=colours", "--attack=apgd", "--at_iter=1", "--batch_size=8", "--epochs=1", "--lr-max=0.001"]
FLAGS += ["--device=cpu", "--threads=1"]


def theirs(arch: str, num_classes: int, size: int) -> nn.Module:
    """The network as its library's documentation makes it."""
    library, name = arch.split(":")
    if library == "torchvision":
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes)
        return model
    sizes = {"img_size": size} if "vit" in name or "xcit" in name else {}
    made: nn.Module = timm.create_model(name, num_classes=num_classes, **sizes)
    return made


@pytest.mark.parametrize(
    "arch",
    [
        "timm:convnext_atto",
        "timm:vit_tiny_patch16_224",
        "timm:xcit_nano_12_p16_224",
        "torchvision:resnet18",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in LARGE),
    ],
)
def test_trained_resumed_and_evaluated(arch: str, cut_off: Callable[..., None]) -> None:
    """Logits of the checkpoint are those of the library's own network behind its normalisation."""
    flags = [*FLAGS, f"--arch={arch}", "--save_every=0.00001"]
    whole = train.main([*flags, "--save_dir=whole"])
    cut_off(1, *flags, "--save_dir=cut")
    [cut] = Path("cut").iterdir()
    train.main([f"--resume={cut}"])
    ours, others = (load_tensors(folder / "ep_1.pth") for folder in (whole, cut))
    assert all(torch.equal(value, others["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert ours["spec"]["arch"] == arch
    assert ours["spec"]["image_size"] == 32

    expected = theirs(arch, 3, 32).eval()
    state = ours["state_dict"].items()
    expected.load_state_dict({name.removeprefix("model."): each for name, each in state if name.startswith("model.")})
    mean, std = (torch.tensor([[0.5]])[:, :, None],) * 2 if "vit" in arch else IMAGENET
    loaded = load_model(str(whole / "ep_1.pth"), "", "colours").model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), expected((X - mean) / std))

    result = eval_script.main([f"--model_name={whole}/ep_1.pth", "--attacks=fast", "--n_iter=4", "--n_ex=2"])
    assert json.loads((result / "eval.json").read_text())["settings"]["dataset"] == "colours"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights that a library would download come from weights.safetensors; the addresses that were asked for."""
    asked: list[str] = []

    def downloaded(address: str, model_dir: Path) -> Path:
        asked.append(address)
        return Path("weights.safetensors").absolute()

    monkeypatch.setattr(models.libraries, "downloaded", downloaded)
    return asked


def saved(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    save_file(state, "weights.safetensors")
    return state


@pytest.mark.parametrize(
    ("arch", "address"),
    [
        ("timm:resnet18", "hf:timm/resnet18.a1_in1k/model.safetensors"),
        ("timm:resnet18.tv_in1k", "hf:timm/resnet18.tv_in1k/model.safetensors"),
        ("torchvision:resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    ],
)
def test_published_weights(arch: str, address: str, published: list[str]) -> None:
    model = theirs(arch, 1000, 32).eval()
    saved(model)
    loaded = load_model(arch, "", "cifar10", NetworkFlags(shape=RGB))
    assert published == [address]
    assert loaded.about == {"image_size": 32, "dataset": "imagenet"}
    mean, std = IMAGENET
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(X), model((X - mean) / std))
    assert load_model(arch, "", "imagenet").about["image_size"] == 224


def test_published_weights_of_a_transformer_fit_other_images(published: list[str]) -> None:
    """Position embeddings are interpolated: those of a constant are that constant. timm alone takes grey images."""
    model = timm.create_model("vit_tiny_patch16_224")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 3.0
    saved(model)
    loaded = load_model("timm:vit_tiny_patch16_224", "", "cifar10", NetworkFlags(shape=RGB)).model
    embedding = loaded.get_parameter("model.pos_embed")
    assert embedding.shape == (1, 1 + 4, 192)
    torch.testing.assert_close(embedding[:, 1:], torch.full((1, 4, 192), 3.0))
    grey = load_model("timm:vit_tiny_patch16_224", "", "digits", NetworkFlags(shape=(1, 32, 32)))
    weight = grey.model.get_parameter("model.patch_embed.proj.weight")
    torch.testing.assert_close(weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    assert (grey.spec["mean"], grey.spec["std"]) == ([0.5], [0.5])


def test_weights_for_another_size_are_refused(published: list[str]) -> None:
    saved(torchvision.models.vit_b_32(num_classes=1000))
    with pytest.raises(ValueError, match="for images of 224 pixels, not 32"):
        load_model("torchvision:vit_b_32", "", "cifar10", NetworkFlags(shape=RGB))


def test_fine_tuned_on_other_classes(published: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    saved(timm.create_model("resnet18"))
    flags = [*FLAGS, "--finetune_model", "--model_name=timm:resnet18", "--save_every=0.00001"]
    folder = train.main(flags)
    assert "new last layer with random weights: model.fc, 3 outputs" in capsys.readouterr().out
    loaded = load_model(str(folder / "ep_1.pth"), "", "colours").model
    assert loaded(X).shape == (2, 3)
    assert folder.name.startswith("colours_from-timm-resnet18_apgd")


def test_each_layer_of_a_transformer_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = train.optimizer_step

    def spy(optimizer: torch.optim.Optimizer, *more: Any) -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer, *more)

    monkeypatch.setattr(train, "optimizer_step", spy)
    saved(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3))
    flags = [*FLAGS, "--finetune_model", "--model_name=timm:vit_tiny_patch16_224@weights.safetensors", "--epochs=2"]
    flags += ["--optimizer=adamw", "--layer_decay=0.5", "--lr-schedule=piecewise-1", "--lr-max=0.25", "--head=auto"]
    folder = train.main([*flags, "--head_lr=10", "--freeze_epochs=1"])
    assert seen[0] == [0] * 13 + [2.5]  # the backbone is frozen; its last layer was the head
    assert seen[-1] == [0.25 * 0.5**n for n in range(13, 0, -1)] + [2.5]
    assert [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0.25, 0.25]


def test_layers_are_those_of_the_blocks() -> None:
    model = build_model("timm:vit_tiny_patch16_224", num_classes=3, image_size=32)
    rates = layer_factors(model, 0.5)
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    for name, rate in found.items():
        block = re.match(r"model\.blocks\.(\d+)\.", name)
        behind = 12 - int(block[1]) if block else {"head": 0, "norm": 1}.get(name.split(".")[1], 13)
        assert rate == 0.5**behind, name


def test_layers_that_nobody_knows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    saved(torchvision.models.resnet18(num_classes=3))
    with pytest.raises(SystemExit):
        train.main(
            [*FLAGS, "--finetune_model", "--model_name=torchvision:resnet18@weights.safetensors", "--layer_decay=0.5"]
        )
    assert "argument --layer_decay: it is for networks of timm" in capsys.readouterr().err
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_of_any_file(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a robust network of someone's: other classes, something before the names, weights alone."""
    model = theirs(arch, 3, 32).eval()
    saved(model, prefix="module.model.")
    name = f"{arch}@weights.safetensors"
    loaded = load_model(name, "", "colours", NetworkFlags(shape=RGB))
    mean, std = IMAGENET
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(X), model((X - mean) / std))
        plain = load_model(name, "", "colours", NetworkFlags(shape=RGB, mean=(0.0,), std=(1.0,))).model.eval()
        torch.testing.assert_close(plain(X), model(X))
    eval_script.main([f"--model_name={name}", "--dataset=colours", "--only_clean", "--n_ex=4"])
    assert "weights.safetensors holds weights alone: input normalisation with mean 0.485" in capsys.readouterr().out
    other = "timm:resnet34" if arch.startswith("timm") else "torchvision:resnet34"
    with pytest.raises(ValueError, match="another network"):
        load_model(f"{other}@weights.safetensors", "", "colours")
    torch.save({"fc.bias": torch.zeros(3)}, "part.pth")
    with pytest.raises(ValueError, match=r"no fc\.weight, the last layer"):
        load_model(f"{arch}@part.pth", "", "colours")


def test_a_checkpoint_of_ours_is_named_with_its_network_or_without(published: list[str]) -> None:
    folder = train.main([*FLAGS, "--arch=timm:resnet18"])
    path = folder / "ep_1.pth"
    assert load_model(f"timm:resnet18@{path}", "", "colours").spec == load_model(str(path), "", "colours").spec
    with pytest.raises(ValueError, match="its network is timm:resnet18, not timm:resnet34"):
        load_model(f"timm:resnet34@{path}", "", "colours")


def test_new_spec_has_the_normalization_of_the_library_unless_another_is_given() -> None:
    spec = new_spec("timm:vit_tiny_patch16_224", num_classes=3, image_size=32, act=None)
    assert (spec["mean"], spec["std"], spec["image_size"]) == ([0.5] * 3, [0.5] * 3, 32)
    assert new_spec("timm:vit_tiny_patch16_224", num_classes=3, mean=[0.0], std=[1.0])["mean"] == [0.0]


def test_build_model() -> None:
    torch.manual_seed(0)
    model = build_model("timm:resnet18", in_channels=1).eval()
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=10, in_chans=1).eval()
    x = X[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain((x - 0.449) / 0.226))
    with pytest.raises(ValueError, match="takes no act or width"):
        build_model("timm:resnet18", act="relu", width=8)
    with pytest.raises(ValueError, match="takes RGB images"):
        build_model("torchvision:resnet18", in_channels=1)


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_every_name_that_is_suggested_is_one(library: str) -> None:
    for name in LIBRARIES[library].names()[::40]:
        with pytest.raises(ValueError, match=f"{library} has no network .*did you mean"):
            build_model(f"{library}:{name}0x")
        assert LIBRARIES[library].preset(name).size >= 32
        assert LIBRARIES[library].head(name).endswith("weight")


@pytest.mark.parametrize(
    "sizes", [{"num_classes": 10**12}, {"image_size": -1}, {"num_classes": "2"}, {"in_channels": 0}]
)
def test_a_checkpoint_that_says_impossible_sizes(sizes: dict[str, object]) -> None:
    spec = {"arch": "timm:resnet18", "num_classes": 10, "in_channels": 3, "image_size": 32} | sizes
    torch.save({"state_dict": {"fc.weight": torch.zeros(10, 512)}, "spec": spec}, "net.pth")
    with pytest.raises(ValueError, match="classes, channels or pixels"):
        load_model("net.pth", "", "colours")
