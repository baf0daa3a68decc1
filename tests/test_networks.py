"""Every network of the registry, and one of a user's own: built, recognised, trained, resumed, fine-tuned and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eval as eval_script
import train
from models import NETWORKS, NetworkSpec, build_model, find_network, new_spec, register_network
from models.from_file import rebuild
from models.networks import describe_networks
from models.pretrained import load_model
from utils.checkpoint import load_tensors

SIZES = {"num_classes": 7, "in_channels": 1}
RUN = ["--dataset=digits", "--n_ex_train=100", "--epochs=1", "--attack=apgd", "--at_iter=1", "--device=cpu"]


class Toy(nn.Module):
    """A network that this file adds to the registry."""

    def __init__(self, features: int, num_classes: int = 10, in_channels: int = 3, act: str = "relu") -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, features, 3, stride=2)
        self.last = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().mean((2, 3)))


def recognise_toy(state: dict[str, Tensor]) -> dict[str, object] | None:
    if state.keys() != {"first.weight", "first.bias", "last.weight", "last.bias"}:
        return None
    features, in_channels = state["first.weight"].shape[:2]
    return {"arch": f"toy-{features}", "num_classes": len(state["last.weight"]), "in_channels": in_channels}


TOY = NetworkSpec(
    name="toy-FEATURES",
    summary="a network of two layers",
    build=Toy,
    recognise=recognise_toy,
    small={"arch": "toy-8"},
    finetune_lr=0.02,
)


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One network more, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    register_network(TOY)
    yield
    del NETWORKS[TOY.name]


networks = pytest.mark.parametrize("network", [*NETWORKS.values(), TOY], ids=lambda network: network.name)


@networks
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
def test_logits(network: NetworkSpec, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = build_model(**network.small, num_classes=7, in_channels=shape[0])
        assert model(torch.empty(2, *shape)).shape == (2, 7)
    assert find_network(network.small["arch"]) is network


@networks
def test_a_plain_state_dict_and_a_checkpoint_tell_their_network(network: NetworkSpec) -> None:
    torch.manual_seed(0)
    model, spec = build_model(**network.small, **SIZES).eval(), new_spec(**network.small, **SIZES)
    torch.save(model.state_dict(), "plain.pth")
    torch.save({"spec": spec, "state_dict": model.state_dict()}, "checkpoint.pth")
    x = torch.rand(2, 1, 8, 8)
    for name in ("plain.pth", "checkpoint.pth"):
        loaded = load_model(name, ".", "digits")
        assert loaded.spec == spec | ({"act": network.act} if name == "plain.pth" else {})
        assert torch.equal(loaded.model.eval()(x), model(x))
    assert rebuild(spec, None).state_dict().keys() == model.state_dict().keys()
    others = [other for other in NETWORKS.values() if other is not network]
    assert [other.name for other in others if other.recognise(model.state_dict())] == []


@networks
def test_trained_fine_tuned_and_evaluated(network: NetworkSpec) -> None:
    size = [f"--{name}={value}" for name, value in network.small.items()]
    folder = train.main([*RUN, *size])
    config, content = json.loads((folder / "config.json").read_text()), load_tensors(folder / "ep_1.pth")
    spec = {"num_classes": 10, "in_channels": 1, "act": network.act} | network.small
    assert content["spec"] == spec
    assert (config["arch"], config["act"], config["width"]) == (spec["arch"], network.act, spec.get("width"))
    assert config["lr_max"] == 0.05
    torch.save(content["state_dict"], "plain.pth")
    for start, arch in ((f"{folder}/ep_1.pth", []), ("plain.pth", [f"--arch={spec['arch']}"])):
        tuned = train.main([*RUN, "--finetune_model", f"--model_name={start}", *arch])
        config = json.loads((tuned / "config.json").read_text())
        assert (config["network"], config["lr_max"]) == (spec, network.finetune_lr)
        assert load_tensors(tuned / "ep_1.pth")["spec"] == spec
    accuracy = []
    for name in (f"{folder}/ep_1.pth", "plain.pth"):
        result = eval_script.main([f"--model_name={name}", "--dataset=digits", "--only_clean", "--device=cpu"])
        accuracy.append(json.loads((result / "eval.json").read_text())["accuracy"]["clean"])
    assert accuracy[0] == accuracy[1]


@networks
def test_help_and_errors_name_it(network: NetworkSpec, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{network.name} ({network.summary})" in describe_networks()
    with pytest.raises(ValueError, match=network.name):
        build_model("resnet50")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert network.summary in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="already"):
        register_network(network)


# Networks that a function of the user's makes

NETS = """
import torch
from torch.nn import Linear
from torchvision.models import resnet18

class Net(torch.nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))

    def forward(self, x):
        return self.layers(x)

def fixed():
    return Net(10, 1)

def anything(**kwargs):
    net = fixed()
    net.given = kwargs
    return net

def with_width(num_classes, in_channels, *, width=5):
    net = Net(num_classes, in_channels)
    net.width = width
    return net

def needs_more(depth, num_classes, size):
    return None

def in_order(num_classes, /):
    return Net(num_classes)

def three():
    return 3

def fails(num_classes):
    numbers = [1, 2]
    return numbers[num_classes]
"""
EAT = ["--dataset=digits", "--n_ex_train=64", "--attack=apgd", "--at_iter=2", "--batch_size=32", "--device=cpu"]


@pytest.fixture
def nets() -> Path:
    file = Path("nets.py")
    file.write_text(NETS)
    return file


def test_a_function_gets_the_sizes_that_it_takes(nets: Path) -> None:
    given = {"num_classes": 4, "in_channels": 1}
    assert build_model("nets.py:Net", **given).layers[1].weight.shape == (4, 64)
    assert build_model("nets.py:fixed", **given).layers[1].weight.shape == (10, 64)
    assert build_model("nets.py:anything", **given, act="relu").given == given | {"act": "relu"}
    assert build_model("nets.py:with_width", **given).width == 5
    assert build_model("nets.py:with_width", **given, width=7, act=None).width == 7
    assert build_model(str(nets.resolve()) + ":fixed") is not None


@pytest.mark.parametrize(
    ("function", "more", "words"),
    [
        ("needs_more", {}, ["nets.py:needs_more needs depth, size;", "num_classes, in_channels"]),
        ("in_order", {}, ["needs num_classes"]),
        ("fixed", {"act": "relu"}, ["takes no act", "leave --act out"]),
        ("Net", {"act": "relu", "width": 8}, ["takes no act or width", "leave --act and --width out"]),
        ("three", {}, ["torch.nn.Module", "int"]),
        ("absent", {}, ["nets.py has no function absent"]),
        ("Linear", {"width": 3, "act": "relu"}, ["needs in_features, out_features"]),
        ("resnet18", {}, ["nets.py: TypeError: ", "in_channels"]),
        ("fails", {}, [f"nets.py, line {NETS.count(chr(10))}: IndexError: list index out of range"]),
    ],
)
def test_a_function_that_does_not_fit_gives_one_line(
    function: str, more: dict[str, object], words: list[str], nets: Path
) -> None:
    with pytest.raises(ValueError, match=f"{function}|nets.py") as error:
        build_model(f"nets.py:{function}", num_classes=10, in_channels=1, **more)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\n\nimport absent_module\n", ["line 3", "ModuleNotFoundError", "absent_module"]),
        ("def make(:\n    pass\n", ["line 1", "SyntaxError"]),
        ("x = 1\nraise RuntimeError('two\\nlines')\n", ["line 2", "RuntimeError: two lines"]),
    ],
)
def test_an_error_in_the_file_is_one_line_with_its_place(text: str, words: list[str]) -> None:
    Path("broken.py").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.py, line") as error:
        build_model("broken.py:make", num_classes=10)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_checkpoint_alone_runs_no_code(nets: Path) -> None:
    """Not even one whose spec gives a file for the name of its network."""
    state = build_model("nets.py:fixed").state_dict()
    nets.write_text("from pathlib import Path\n\nPath('ran').touch()\n" + NETS)
    for spec in ({"arch": "nets.py:fixed"}, {"arch": "function", "function": "nets.py:fixed"}):
        torch.save({"spec": spec, "state_dict": state}, "net.pth")
        with pytest.raises(ValueError, match=r"nets\.py:fixed"):
            load_model("net.pth", ".", "digits")
        with pytest.raises(ValueError, match=r"nets\.py:fixed"):
            rebuild(spec, "other.py:fixed")
    assert not Path("ran").exists()


def test_a_network_of_ones_own_is_trained_resumed_tuned_and_evaluated(nets: Path) -> None:
    whole = train.main([*EAT, "--arch=nets.py:with_width", "--width=3", "--epochs=2"])
    content = load_tensors(whole / "ep_2.pth")
    own = {"arch": "function", "function": "nets.py:with_width"}
    assert content["spec"] == own | {"num_classes": 10, "in_channels": 1, "width": 3}
    name = f"nets.py:with_width@{whole}/ep_2.pth"
    loaded = load_model(name, ".", "digits")
    assert (loaded.spec, loaded.model.width, loaded.about["epoch"]) == (content["spec"], 3, 2)
    rebuilt = rebuild(content["spec"], "./nets.py:with_width")
    assert rebuilt.width == 3
    assert rebuilt.state_dict().keys() == content["state_dict"].keys()
    result = eval_script.main([f"--model_name={name}", "--only_clean", "--n_ex=50", "--device=cpu"])
    assert json.loads((result / "eval.json").read_text())["accuracy"]["clean"]["points"] == 50
    tuned = train.main([*EAT, "--finetune_model", f"--model_name={name}", "--epochs=1"])
    assert load_tensors(tuned / "ep_1.pth")["spec"] == content["spec"]
    assert json.loads((tuned / "config.json").read_text())["lr_max"] == 0.01


def test_a_run_of_ones_own_network_goes_on(nets: Path, cut_off: Callable[..., None]) -> None:
    flags = [*EAT, "--arch=nets.py:Net", "--epochs=2", "--save_every=0.00001"]
    whole = train.main(flags)
    cut_off(3, *flags, "--save_dir=cut")
    [cut] = Path("cut").iterdir()
    assert train.main([f"--resume={cut}", "--arch=nets.py:Net"]) == cut
    ours, theirs = (load_tensors(folder / "ep_2.pth")["state_dict"] for folder in (cut, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
