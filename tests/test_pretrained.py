"""Networks by name: files of every usual wrapping, downloads that go wrong, RobustBench's from a file in place."""

import http.server
import json
import os
import threading
import types
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from urllib.request import urlretrieve

import gdown
import pytest
import torch
from PIL import Image

from models import build_model, pretrained
from models.from_file import NetworkFlags
from models.pretrained import load_model
from utils.checkpoint import load_tensors, save_atomic

IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet18", width=8).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": state, "opt_state_dict": {}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.model.{name}": tensor for name, tensor in state.items()}},
    ],
)
def test_the_usual_wrappings(wrap, network, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(wrap(network.state_dict()), tmp_path / "net.pth")
    loaded = load_model("net.pth", str(tmp_path), "cifar10")
    assert torch.equal(loaded.model.eval()(IMAGES), network(IMAGES))
    assert loaded.spec["width"] == 8


def test_the_authors_run_names_tell_the_activation(network, tmp_path: Path) -> None:
    folder = tmp_path / "2021-05-10 12:00:00 act=relu fts=pretr_Linf"
    folder.mkdir()
    torch.save(network.state_dict(), folder / "ep_3.pth")
    assert load_model(f"{folder}/ep_3.pth", ".", "cifar10").spec["act"] == "relu"
    assert load_model(f"{folder}/ep_3.pth", ".", "cifar10", NetworkFlags(act="silu")).spec["act"] == "silu"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local HTTP server and the folder that it serves."""
    root = tmp_path / "served"
    root.mkdir()
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(root)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", root
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("spelling", ["pretr_L1.pth", "pretr_L1"])
@pytest.mark.parametrize("served", ["whole", "web page", "short", "other network", "nothing"])
def test_download_of_the_authors_files(spelling, served, network, server, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    address, root = server
    if served == "whole":
        torch.save(network.state_dict(), root / "pretr_L1.pth")
    elif served == "web page":
        (root / "pretr_L1.pth").write_text("<html>Too many users have viewed this file recently</html>")
    elif served == "short":
        torch.save(network.state_dict(), root / "whole.pth")
        (root / "pretr_L1.pth").write_bytes((root / "whole.pth").read_bytes()[:20_000])
    elif served == "other network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), root / "pretr_L1.pth")
    # The folder's list and the file come from the local server instead of Google Drive.
    listing = [types.SimpleNamespace(id="7", path=f"pretr_{norm}.pth") for norm in ("Linf", "L2", "L1")]
    monkeypatch.setattr(gdown, "download_folder", lambda **_: listing)
    monkeypatch.setattr(gdown, "download", lambda output, **_: urlretrieve(f"{address}/pretr_L1.pth", output))
    model_dir = tmp_path / "pretrained"
    if served == "whole":
        assert torch.equal(load_model(spelling, str(model_dir), "cifar10").model.eval()(IMAGES), network(IMAGES))
        assert [path.name for path in model_dir.iterdir()] == ["pretr_L1.pth"]
    else:
        with pytest.raises(ValueError, match="could not be downloaded; get it in a browser"):
            load_model(spelling, str(model_dir), "cifar10")
        assert not model_dir.exists()


def test_robustbench_from_a_file_in_place_and_its_fine_tuned_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = {"arch": "robustbench", "model_id": "Wong2020Fast", "threat": "Linf", "dataset": "cifar10"}
    theirs = build_model(**spec).eval()
    place = tmp_path / "cifar10" / "Linf"
    place.mkdir(parents=True)
    torch.save(theirs.state_dict(), place / "Wong2020Fast.pt")
    for name in ("RB_Wong2020Fast", "RB_Wong2020Fast_Linf"):
        loaded = load_model(name, str(tmp_path), "cifar10")
        assert loaded.spec == spec
        assert torch.equal(loaded.model(IMAGES), theirs(IMAGES))
    save_atomic({"spec": loaded.spec, "state_dict": loaded.model.state_dict()}, tmp_path / "ep_3.pth")
    assert torch.equal(load_model(str(tmp_path / "ep_3.pth"), ".", "cifar10").model.eval()(IMAGES), theirs(IMAGES))


def test_robustbench_names_with_underscores_and_unknown_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import robustbench_zoo

    with robustbench_zoo._importable():
        assert robustbench_zoo._find("Rebuffi2021Fixing_70_16_cutmix_extra", None, "cifar10") == "Linf"
        assert robustbench_zoo._find("Engstrom2019Robustness", "L2", "cifar10") == "L2"
        assert robustbench_zoo._find("Augustin2020Adversarial_34_10", None, "cifar10") == "L2"
    with pytest.raises(ValueError, match=r"did you mean.*RB_Engstrom2019Robustness"):
        load_model("RB_Engstrom2019Robust", str(tmp_path), "cifar10")
    import robustbench.utils

    def web_page(gdrive_id: str, path: Path) -> None:
        Path(path).write_text("<html>Quota exceeded</html>")

    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", web_page)
    with pytest.raises(ValueError, match=r"could not be downloaded.*save it as .*Wong2020Fast\.pt"):
        load_model("RB_Wong2020Fast", str(tmp_path / "new"), "cifar10")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("model_id", "dataset", "size", "way"),
    [
        ("Salman2020Do_R50", "imagenet", 224, "size=256, interpolation=bilinear"),
        ("Liu2023Comprehensive_ConvNeXt-B", "imagenet", 224, "size=256, interpolation=bicubic"),
        ("Debenedetti2022Light_XCiT-S12", "imagenet", 224, "size=224, interpolation=bicubic"),
        ("Mo2022When_ViT-B", "imagenet", 224, "size=[224, 224]"),
        ("Wong2020Fast", "imagenet", 288, "CenterCrop"),
        ("Addepalli2021Towards_PARN18", "cifar100", None, ""),
        ("Wong2020Fast", "cifar10", None, ""),
    ],
)
def test_robustbench_tells_how_its_test_images_are_made(
    model_id: str, dataset: str, size: int | None, way: str
) -> None:
    from models import robustbench_zoo

    with robustbench_zoo._importable():
        assert robustbench_zoo._find(model_id, None, dataset) == "Linf"
    spec = {"arch": "robustbench", "model_id": model_id, "threat": "Linf", "dataset": dataset}
    prepare = robustbench_zoo.published_preparation(spec, size)
    assert robustbench_zoo.published_preparation(spec, 96) is None
    if size is None:
        assert prepare is None
    else:
        assert prepare is not None
        assert prepare(Image.new("RGB", (500, 400))).size == (size, size)
        assert way in str(prepare)


def test_a_robustbench_network_of_imagenet_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import eval as eval_script

    monkeypatch.chdir(tmp_path)
    spec = {"arch": "robustbench", "model_id": "Salman2020Do_R18", "threat": "Linf", "dataset": "imagenet"}
    torch.manual_seed(0)
    theirs = build_model(**spec).eval()
    place = tmp_path / "nets" / "imagenet" / "Linf"
    place.mkdir(parents=True)
    torch.save(theirs.model.state_dict(), place / "Salman2020Do_R18.pt")
    for part, number in product(("train", "val"), range(1000)):
        file = tmp_path / "images" / part / f"n{number:04}" / "1.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number % 256, 0, number // 4)).save(file)
    flags = ["--dataset=imagenet", "--data_dir=images", "--model_name=RB_Salman2020Do_R18", "--model_dir=nets"]
    folder = eval_script.main([*flags, "--only_clean", "--n_ex=2", "--device=cpu"])
    assert json.loads((folder / "eval.json").read_text())["settings"]["image_size"] == 224
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    loaded = load_model("RB_Salman2020Do_R18", "nets", "imagenet")
    with torch.no_grad():
        assert torch.equal(loaded.model(images), theirs(images))


def test_robustbench_networks_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import robustbench_zoo

    with robustbench_zoo._importable():
        import robustbench.utils

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", no_network)
    monkeypatch.setattr(robustbench.utils.timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"no network.*uc\?id=1OThC.*save it as .*imagenet.Linf.Salman2020Do_R18\.pt"):
        load_model("RB_Salman2020Do_R18", str(tmp_path / "new"), "imagenet")
    with pytest.raises(ValueError, match=r"XCiT-S12 could not be downloaded \(OSError: no network\)$"):
        load_model("RB_Debenedetti2022Light_XCiT-S12", str(tmp_path / "new"), "imagenet")
    with pytest.raises(ValueError, match="cifar10 or cifar100 or imagenet"):
        load_model("RB_Salman2020Do_R18", str(tmp_path / "new"), "imagefolder")
    with pytest.raises(ValueError, match=r"no imagenet model 'Salman2020Do_R19'.*did you mean.*RB_Salman2020Do_R18"):
        load_model("RB_Salman2020Do_R19", str(tmp_path / "new"), "imagenet")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ep_1.pth"
    save_atomic({"epoch": 1}, path)

    def fails(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space"):
        save_atomic({"epoch": 2}, path)
    assert load_tensors(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["ep_1.pth"]


@pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR is not set")
def test_the_network_beside_the_true_data_has_its_published_accuracy() -> None:
    from data import load_dataset

    folder = Path(os.environ["CIFAR10_DIR"]) / "pretrained"
    if not folder.exists():
        pytest.skip("no pretrained network beside the data")
    model = pretrained.load_model("pretr_Linf.pth", str(folder), "cifar10").model.eval()
    x, y = load_dataset("cifar10", os.environ["CIFAR10_DIR"]).test.take(200).pixels()
    with torch.no_grad():
        assert 0.55 < (model(x).argmax(1) == y).float().mean() < 0.68
