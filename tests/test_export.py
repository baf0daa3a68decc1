"""--export: the network bit for bit, figures as the checkpoint's, a card that says what was done; files that others or nobody wrote."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eval as eval_script
import train
from models.pretrained import load_model
from utils.checkpoint import load_tensors
from utils.safetensors_files import safetensors_bytes

RUN = ["--dataset=digits", "--width=4", "--epochs=2", "--n_ex_train=64", "--device=cpu", "--threads=1", "--attack=apgd"]
RUN += ["--l_norms=Linf L1", "--at_iter=2", "--mean=0.5", "--std=0.25"]


def evaluated(name: Path) -> dict[str, object]:
    flags = ["--attacks=fast", "--n_iter=4", "--n_ex=20", "--device=cpu", "--threads=1"]
    content = json.loads((eval_script.main([f"--model_name={name}", *flags]) / "eval.json").read_text())
    return {key: content[key] for key in ("accuracy", "outcomes")}


def test_an_exported_network_is_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    flags = [*RUN, "--n_ex_val=20", "--n_ex_eval=20", "--eval_freq=1", "--select=clean", "--ema=0.9"]
    run = train.main([*flags, "--export=out/net.safetensors"])
    theirs, ours = load_tensors(run / "best.pth"), load_tensors(Path("out/net.safetensors"))
    assert theirs["state_dict"].keys() == ours["state_dict"].keys()
    assert all(torch.equal(each, ours["state_dict"][name]) for name, each in theirs["state_dict"].items())
    assert {key: ours[key] for key in ("spec", "dataset", "threats", "epoch")} == {
        key: theirs[key] for key in ("spec", "dataset", "threats", "epoch")
    }
    assert evaluated(Path("out/net.safetensors")) == evaluated(run / "best.pth")
    card = Path("out/README.md").read_text()
    env = json.loads((run / "env.json").read_text())
    for said in ("adversarial-robustness", "digits", "Linf 0.1, L1 2", "random weights", env["commit"], "eat: ",
                 env["packages"]["torch"], "'--l_norms=Linf L1'", "may be too high",
                 "eval.py --model_name=net.safetensors", 'load_model(\'net.safetensors\', ".", \'digits\')'):  # fmt: skip
        assert said in card, said
    # Exported by this run already: nothing is done, and nothing is an error. By another run: nothing is overwritten.
    before = Path("out/net.safetensors").read_bytes(), card
    assert train.main([f"--resume={run}"]) == run
    Path("out/README.md").unlink()
    train.main([f"--resume={run}"])
    assert (Path("out/net.safetensors").read_bytes(), Path("out/README.md").read_text()) == before
    with pytest.raises(SystemExit) as stop:
        train.main([*RUN, "--export=out/net.safetensors"])
    assert stop.value.code == 2
    assert "exists, and is not overwritten" in capsys.readouterr().err


def test_a_complete_run_is_exported_with_its_final_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train.main([*RUN, "--epochs=1"])
    rows = {"clean": {"accuracy": 50.0, "low": 40.25, "high": 60.0, "points": 100}}
    (run / "eval.json").write_text(json.dumps({"accuracy": rows}))
    train.main([f"--resume={run}", "--export=net.safetensors"])
    card = Path("README.md").read_text()
    assert "first 100 test images" in card
    assert "| clean | 50.0 | 40.2 to 60.0 |" in card
    model = load_model("net.safetensors", ".", "cifar10").model
    code = card.split("```python\n")[1].split("```")[0]
    found: dict[str, torch.nn.Module] = {}
    exec(code, found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found["model"].parameters(), strict=True))


@pytest.mark.parametrize("metadata", [None, {"made": "by others"}, {"checkpoint": "{"}, {"checkpoint": "[" * 10**5},
                                      {"checkpoint": "3"}, {"checkpoint": '{"spec": 3, "state_dict": 4}'}])  # fmt: skip
def test_metadata_of_others_is_not_believed(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")["state_dict"]["a"], tensors["a"])


def test_files_that_are_damaged_or_lie(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.safetensors", safetensors_bytes({"a": torch.arange(1000)}, {"epoch": 1})
    sizes = [size.to_bytes(8, "little") + whole[8:] for size in (0, 2**40, 2**63, 2**64 - 1)]
    bad = [b"", whole[:7], whole[:100], whole[:-1], whole + b"x", *sizes, whole.replace(b"[1000]", b"[9999]")]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
            load_tensors(path)


def test_tied_and_strided_weights_are_written(tmp_path: Path) -> None:
    tied = torch.rand(3, 4)
    (tmp_path / "a").write_bytes(safetensors_bytes({"a": tied, "b": tied, "c": tied.T}, {}))
    found = load_tensors(tmp_path / "a")["state_dict"]
    assert torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied.T)
