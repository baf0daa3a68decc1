"""Every usage error: exit code 2, one line that names the flag and what to do, no traceback, no file left behind."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import train
from models import build_model
from utils.safetensors_files import safetensors_bytes

DIGITS = ["--dataset=digits"]
APGD = [*DIGITS, "--attack=apgd"]
TUNE = [*APGD, "--finetune_model"]


class Code:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


# flags, the flag that the message must name, a word of what to do
TRAIN_ERRORS = [
    ([*APGD, "--l_norms=L3"], "--l_norms", "Linf L2 L1"),
    ([*APGD, "--l_norms=Linf Linf"], "--l_norms", "once"),
    ([*APGD, "--l_norms= "], "--l_norms", "at least one"),
    ([*APGD, "--l_norms=Linf L1", "--l_eps=0.1"], "--l_eps", "one radius for each norm"),
    ([*APGD, "--l_norms=Linf", "--l_eps=0.1 2"], "--l_eps", "one radius for each norm"),
    ([*APGD, "--l_norms=Linf", "--l_eps=-0.1"], "--l_eps", "above 0"),
    ([*APGD, "--l_norms=Linf", "--l_eps=0"], "--l_eps", "above 0"),
    ([*APGD, "--l_norms=Linf", "--l_eps=8/0"], "--l_eps", "8/255"),
    ([*APGD, "--l_norms=Linf", "--l_eps=inf"], "--l_eps", "8/255"),
    ([*APGD, "--l_norms=Linf L1", "--l_eps=8 12"], "--l_eps", "8/255"),
    ([*APGD, "--l_norms=Linf", "--l_eps=1"], "--l_eps", "whole box"),
    ([*APGD, "--l_norms=L2", "--l_eps=1e-300"], "--l_eps", "below 1e-06"),
    ([*APGD, "--eval_eps=8 0.5 12"], "--eval_eps", "8/255"),
    ([*APGD, "--l_norms=Linf", "--l_iters=5 5"], "--l_iters", "one number of steps"),
    ([*APGD, "--l_iters=5 x"], "--l_iters", "whole number"),
    ([*APGD, "--at_iter=0"], "--at_iter", "at least 1"),
    ([*DIGITS, "--attack=pgd"], "--attack", "apgd"),
    ([*DIGITS, "--lr-schedule=cosin"], "--lr-schedule", "piecewise"),
    ([*DIGITS, "--lr_schedule=piecewise-70-x"], "--lr-schedule", "piecewise"),
    ([*DIGITS, "--lr-max=0"], "--lr-max", "above 0"),
    ([*DIGITS, "--epochs=0"], "--epochs", "at least 1"),
    ([*DIGITS, "--weight_decay=-1"], "--weight_decay", "at least 0"),
    ([*DIGITS, "--layer_decay=0.75"], "--layer_decay", "from scratch"),
    ([*TUNE, "--model_name=x", "--layer_decay=1"], "--layer_decay", "below 1"),
    ([*DIGITS, "--act=tanhh"], "--act", "softplus1"),
    ([*DIGITS, "--arch=resnet50"], "--arch", "wide-resnet-DEPTH-WIDTH"),
    ([*DIGITS, "--arch=robustbench"], "--arch", "preact-resnet18"),
    ([*DIGITS, "--arch=timm:convnext_tinny"], "--arch", "did you mean timm:convnext_tiny"),
    ([*DIGITS, "--arch=timm:resnet18.mine"], "--arch", "it has resnet18.a1_in1k"),
    ([*DIGITS, "--arch=torchvision:resnet19"], "--arch", "did you mean torchvision:resnet18"),
    ([*DIGITS, "--arch=torchvision:resnet18"], "--arch", "takes RGB images"),
    ([*DIGITS, "--arch=timm:resnet18,pretrained"], "--arch", "--model_name=timm:resnet18"),
    ([*DIGITS, "--arch=timm:resnet18", "--width=8"], "--width", "leave"),
    ([*DIGITS, "--arch=timm:resnet18", "--act=relu"], "--act", "leave"),
    ([*DIGITS, "--arch=timm:vit_tiny_patch16_224"], "--arch", "does not take images of shape (1, 8, 8)"),
    ([*TUNE, "--model_name=timm:resnet18", "--act=relu"], "--model_name", "leave --act out"),
    ([*TUNE, "--model_name=timm:resnet18", "--mean=cifar10"], "--model_name", "leave --mean out"),
    ([*TUNE, "--model_name=timm:mixer_s16_224"], "--model_name", "no published weights"),
    (
        [*TUNE, "--model_name=timm:resnet18@net.pth"],
        "--model_name",
        "its network is preact-resnet18, not timm:resnet18",
    ),
    ([*DIGITS, "--arch=wide-resnet-28"], "--arch", "wide-resnet-28-10"),
    ([*DIGITS, "--arch=wide-resnet-28-10000000000"], "--arch", "wide-resnet-28-10"),
    ([*DIGITS, "--arch=wide-resnet-27-10"], "--arch", "6n + 4"),
    ([*DIGITS, "--arch=wide-resnet-10-1", "--width=16"], "--width", "leave"),
    ([*DIGITS, "--seed=-1"], "--seed", "at least 0"),
    ([*DIGITS, "--device=cuda:99"], "--device", "auto"),
    ([*DIGITS, "--device=tpu"], "--device", "auto"),
    ([*DIGITS, "--n_ex_train=99999"], "--n_ex_train", "1297"),
    ([*DIGITS, "--n_ex_eval=501", "--eval_freq=1"], "--n_ex_eval", "500"),
    ([*DIGITS, "--n_ex_final=501", "--final_eval"], "--n_ex_final", "500"),
    ([*DIGITS, "--eval_eps=0.1 0.5"], "--eval_eps", "one radius for each norm"),
    ([*DIGITS, "--model_name=net.pth"], "--model_name", "--finetune_model"),
    (["--dataset=mnist"], "--dataset", "digits"),
    (TUNE, "--finetune_model", "--model_name"),
    ([*TUNE, "--model_name=missing.pth"], "--model_name", "--model_dir"),
    ([*TUNE, "--model_name=net.pth", "--width=8"], "--width", "leave"),
    ([*TUNE, "--model_name=net.pth", "--lr_no_decay=1"], "--lr_no_decay", "leave"),
    ([*TUNE, "--model_name=net.pth", "--act=relu"], "--model_name", "--act=softplus1"),
    ([*TUNE, "--model_name=net.pth", "--arch=wide-resnet-10-1"], "--model_name", "leave --arch"),
    ([*TUNE, "--model_name=wide.pth", "--arch=preact-resnet18"], "--model_name", "network is wide-resnet-10-1"),
    ([*TUNE, "--model_name=colour.pth", "--arch=wide-resnet-10-1"], "--model_name", "network is preact-resnet18"),
    ([*TUNE, "--model_name=RB_Wong2020Fast", "--arch=preact-resnet18"], "--model_name", "leave --arch"),
    ([*TUNE, "--model_name=nets.py:narrow", "--arch=preact-resnet18"], "--model_name", "leave --arch"),
    ([*TUNE, "--model_name=text.pth"], "--model_name", "not a checkpoint"),
    ([*TUNE, "--model_name=code.pth"], "--model_name", "refused"),
    ([*TUNE, "--model_name=empty.pth"], "--model_name", "not a checkpoint"),
    ([*TUNE, "--model_name=cut.pth"], "--model_name", "damaged"),
    ([*TUNE, "--model_name=other.pth"], "--model_name", "another network"),
    ([*TUNE, "--model_name=number.pth"], "--model_name", "state dict"),
    ([*TUNE, "--model_name=colour.pth"], "--model_name", "(1, 8, 8)"),
    ([*TUNE, "--model_name=."], "--model_name", "folder"),
    ([*TUNE, "--model_name=nets.py:absent"], "--model_name", "no function"),
    ([*TUNE, "--model_name=absent.py:make"], "--model_name", "no file"),
    ([*TUNE, "--model_name=nets.py:three"], "--model_name", "torch.nn.Module"),
    ([*TUNE, "--model_name=nets.py:narrow", "--head=no_such"], "--head", "no_such is no linear layer"),
    ([*DIGITS, "--batch_size=1", "--width=4"], "--batch_size", "single image"),
    ([*DIGITS, "--n_ex_train=1", "--width=4"], "--n_ex_train", "single image"),
    ([*DIGITS, "--save_dir=text.pth", "--epochs=1"], "--save_dir", "text.pth"),
    ([*DIGITS, "--epoch=1"], "--epoch", "--help"),
    ([*DIGITS, "--amp=fp16", "--device=cpu"], "--amp", "bf16"),
    ([*DIGITS, "--amp=half"], "--amp", "bf16"),
    ([*DIGITS, "--threads=0"], "--threads", "at least 1"),
    ([*DIGITS, "--multinorm=max"], "--multinorm", "--attack=apgd"),
    ([*APGD, "--multinorm=best"], "--multinorm", "eat-mixed"),
    ([*APGD, "--multinorm=ramp", "--l_norms=Linf L2 L1"], "--multinorm", "two norms"),
    ([*APGD, "--multinorm=msd", "--l_norms=Linf L1", "--l_iters=2 3"], "--multinorm", "one number of steps"),
    ([*APGD, "--multinorm=avg", "--loss=trades"], "--loss", "loss of its own"),
    ([*DIGITS, "--loss=trades"], "--loss", "--attack=apgd"),
    ([*APGD, "--trades_beta=6"], "--trades_beta", "--loss=trades"),
    ([*APGD, "--ramp_lambda=2"], "--ramp_lambda", "--multinorm=ramp"),
    ([*APGD, "--gradient_projection", "--ema=0.9"], "--ema", "leave"),
    ([*DIGITS, "--gradient_projection"], "--gradient_projection", "--attack=apgd"),
    ([*APGD, "--init_epochs=3", "--epochs=2"], "--init_epochs", "2 epochs"),
    ([*APGD, "--init_epochs=1", "--gradient_projection"], "--init_epochs", "--gradient_projection"),
    ([*DIGITS, "--init_epochs=--"], "--init_epochs", "argument --init_epochs"),
    ([*DIGITS, "--ema=1"], "--ema", "above 0 and below 1"),
    ([*DIGITS, "--grad_clip=0"], "--grad_clip", "above 0"),
    ([*DIGITS, "--save_every=0"], "--save_every", "above 0"),
    ([*DIGITS, "--accumulate=0"], "--accumulate", "at least 1"),
    ([*DIGITS, "--image_size=32"], "--image_size", "leave"),
    ([*DIGITS, "--resume=missing"], "--resume", "not the folder of a run"),
    (["--dataset=imagenet", "--data_dir=broken"], "--data_dir", "train/CLASS"),
    ([*DIGITS, "--export=net.pth"], "--export", ".safetensors"),
    ([*DIGITS, "--export=absent/net.safetensors"], "--export", "no folder absent"),
    ([*DIGITS, "--export=cut.safetensors"], "--export", "not overwritten"),
    ([*DIGITS, "--export=carded/net.safetensors"], "--export", "README.md exists"),
    ([*TUNE, "--model_name=cut.safetensors"], "--model_name", "damaged"),
    ([*TUNE, "--model_name=huge.safetensors"], "--model_name", "damaged"),
    ([*TUNE, "--model_name=hf:nets/net.pth"], "--model_name", "hf:USER/REPO/FILE"),
    ([*TUNE, "--model_name=http://a/net.pth#sha1=3"], "--model_name", "64 hexadecimal digits"),
]
# Numbers and texts that no flag can mean.
TRAIN_ERRORS += [
    ([*DIGITS, f"--{flag}={value}"], f"--{flag}", advice)
    for flag, value, advice in (
        ("epochs", "", "whole number"),
        ("epochs", "1000001", "at most 1000000"),
        ("epochs", "9" * 5000, "at most 1000000"),  # more digits than int() takes
        ("epochs", "1_000", "whole number"),
        ("epochs", "\N{ARABIC-INDIC DIGIT THREE}", "whole number"),
        ("epochs", "0x10", "whole number"),
        ("epochs", "1e3", "whole number"),
        ("epochs", "True", "whole number"),
        ("epochs", "\udcff", "'\\\\udcff'"),
        ("batch_size", str(10**30), "at most 1000000"),
        ("batch_size", "nan", "whole number"),
        ("accumulate", str(10**9), "at most"),
        ("threads", "100000", "at most 1024"),
        ("workers", "100000", "at most 256"),
        ("width", "100000", "at most 1024"),
        ("seed", str(2**63), "at most 9223372036854775807"),
        ("image_size", "100000", "at most 4096"),
        ("n_ex_train", "1" + "0" * 40, "at most 1000000000"),
        ("at_iter", "10001", "at most 10000"),
        ("lr-max", "1e308", "below 3.4e+38"),
        ("lr-max", "nan", "8/255"),
        ("lr-max", "-inf", "8/255"),
        ("lr-max", "1_0", "8/255"),
        ("lr-max", "1/1/1", "8/255"),
        ("lr-max", "1/0.0", "8/255"),
        ("lr-max", "1" * 200, "8/255"),
        ("lr-max", "\N{ARABIC-INDIC DIGIT THREE}", "8/255"),
        ("weight_decay", "1e40", "at most 3.4e+38"),
        ("grad_clip", "1e300/1e-300", "below 1e+09"),
        ("trades_beta", "1e30", "below 1e+06"),
        ("ema", "1e-400", "above 0"),
        ("save_every", "1e30", "below 1e+06"),
        ("ramp_lambda", "1e30", "at most"),
        ("l_iters", "3 " * 2000, "at most 1000"),
        ("l_eps", "0.1 " * 5, "one radius for each norm"),
        ("l_eps", "1e300", "below 1e+09"),
        ("l_norms", "Linf " * 900, "once"),
        ("lr-schedule", "piecewise-" + "9" * 4050, "piecewise"),
        ("lr-schedule", "piecewise" + "-1" * 500, "piecewise"),
        ("arch", "wide-resnet-28-999", "weights"),
        ("data_dir", "", "empty"),
        ("data_dir", "a\0b", "NUL"),
        ("save_dir", "x" * 4097, "4096"),
        ("save_dir", "new/" + "x" * 4000, "new"),
        ("notes_run", "a\0b", "NUL"),
        ("device", "cuda:" + "9" * 30, "auto"),
        ("device", "\udcff", "auto"),
        ("extra_data", "", "empty"),
        ("resume", "x" * 4000, "--resume"),
    )
]
EVAL_ERRORS = [
    ([], "--model_name", "name the network"),
    (["--model_name=net.pth", "--n_ex=501"], "--n_ex", "500"),
    (["--model_name=net.pth", "--n_ex=0"], "--n_ex", "at least 1"),
    (["--model_name=net.pth", "--l_norms=L0"], "--l_norms", "Linf"),
    (["--model_name=net.pth", "--l_eps=1"], "--l_eps", "one radius for each norm"),
    (["--model_name=net.pth", "--l_eps=8 0.5 12"], "--l_eps", "8/255"),
    (["--model_name=net.pth", "--l_norms=L1", "--l_eps=1e-7"], "--l_eps", "below 1e-06"),
    (["--model_name=missing.pth"], "--model_name", "--model_dir"),
    (["--model_name=function.pth"], "--model_name", "nets.py:make@"),
    (["--model_name=net.pth", "--dataset=cifar10", "--data_dir=broken"], "--data_dir", "--dataset=digits"),
    (["--model_name=net.pth", "--n_iter=3"], "--n_iter", "at least 4"),
    (["--model_name=net.pth", "--amp=fp16", "--device=cpu"], "--amp", "bf16"),
    (["--model_name=net.pth", "--attacks=pgd"], "--attacks", "standard"),
    (["--model_name=net.pth", "--baseline=absent.json"], "--baseline", "absent.json"),
    (["--model_name=net.pth", "--baseline=text.pth"], "--baseline", "not a JSON file"),
    (["--model_name=net.pth", "--baseline=other.json"], "--baseline", "500 test images"),
    (["--model_name=net.pth", "--save_adv=pth"], "--save_adv", "npy"),
    (["--model_name=net.pth", "--save_adv=pt", "--only_clean"], "--save_adv", "no adversarial images"),
    (["--model_name=net.pth", "--curve=0.1 0.2"], "--curve", "'Linf:0.1'"),
    (["--model_name=net.pth", "--l_norms=L2", "--curve=0.1 L2:0.2 Linf:0.3"], "--curve", "of which norm"),
    (["--model_name=net.pth", "--curve=Linf:0.1 L1"], "--curve", "number or a fraction"),
    (["--model_name=net.pth", "--l_norms=Linf L2", "--curve=L1:6,12"], "--curve", "L1 is not evaluated"),
    (["--model_name=net.pth", "--curve=Linf:0.1,0"], "--curve", "above 0"),
    (["--model_name=net.pth", "--l_norms=L2", "--curve=-1 0.5"], "--curve", "above 0"),
    (["--model_name=net.pth", "--curve=Linf:"], "--curve", "at least one"),
    (["--model_name=net.pth", "--curve=Linf:2,4"], "--curve", "2/255"),
    (["--model_name=net.pth", "--l_norms=Linf", "--curve=2/255 4/510"], "--curve", "twice"),
    (["--model_name=net.pth", "--curve", "--union_only"], "--curve", "leave --union_only"),
    (["--model_name=net.pth", "--curve=Linf:0.1", "--only_clean"], "--curve", "leave --union_only and --only_clean"),
    (["--model_name=net.pth", "--batch_size_eval=x"], "--batch_size_eval", "whole number"),
    (["--model_name=net.pth", "--n_iter=100001"], "--n_iter", "at most 100000"),
    (["--model_name=net.pth", "--n_restarts=100000"], "--n_restarts", "at most 1000"),
    (["--model_name=net.pth", "--n_targets=-1"], "--n_targets", "at least 0"),
    (["--model_name=" + "x" * 4000], "--model_name", "xxx"),
    (["--model_name=a\nb\x1b[31m.pth"], "--model_name", "there is no file a b\\x1b[31m.pth"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of good, bad and odd files, made the current one."""
    monkeypatch.chdir(tmp_path)
    net = {"num_classes": 10, "in_channels": 1, "width": 4}
    state = build_model("preact-resnet18", **net).state_dict()
    spec = {"arch": "preact-resnet18", "act": "softplus1", **net}
    torch.save({"spec": spec, "state_dict": state, "epoch": 1, "dataset": "digits"}, "net.pth")
    torch.save(build_model("preact-resnet18", width=4).state_dict(), "colour.pth")
    torch.save(build_model("wide-resnet-10-1", in_channels=1).state_dict(), "wide.pth")
    torch.save(torch.nn.Linear(3, 3).state_dict(), "other.pth")
    torch.save({"epoch": 3}, "number.pth")
    torch.save({"spec": {"arch": "function", "function": "nets.py:make"}, "state_dict": state}, "function.pth")
    Path("text.pth").write_text("<html>Quota exceeded</html>")
    Path("other.json").write_text('{"settings": {"dataset": "digits", "n_ex": 3}, "outcomes": {}}')
    Path("empty.pth").touch()
    Path("cut.pth").write_bytes(Path("net.pth").read_bytes()[:5000])
    Path("code.pth").write_bytes(pickle.dumps(Code()))
    whole = safetensors_bytes(state, {"spec": spec})
    Path("cut.safetensors").write_bytes(whole[:-1])
    Path("huge.safetensors").write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    Path("carded").mkdir()
    Path("carded/README.md").touch()
    Path("nets.py").write_text(
        "import torch\n\n\ndef three():\n    return 3\n\n\n"
        "def narrow():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))\n"
    )
    Path("broken/cifar-10-batches-py").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "flags", "flag", "advice"),
    [(train, *case) for case in TRAIN_ERRORS] + [(eval_script, *case) for case in EVAL_ERRORS],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_a_usage_error_is_one_line(script, flags, flag, advice, folder, capsys) -> None:  # type: ignore[no-untyped-def]
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert flag in error
    assert advice in error
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_real_process_exits_with_2_and_no_traceback() -> None:
    script = Path(train.__file__)
    run = subprocess.run([sys.executable, script, "--epochs=-1"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1
