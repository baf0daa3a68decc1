"""Weights by address: whole or not at all, resumed, kept, checked; and what servers do wrong. All from a server in this process."""

import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch

import eval as eval_script
import train
from models import build_model
from models.downloads import downloaded, without_digest
from models.pretrained import load_model
from utils.checkpoint import load_tensors
from utils.safetensors_files import safetensors_bytes

NET = {"num_classes": 10, "in_channels": 1, "width": 4}
HUB = "0" * 40  # a commit


@dataclass
class Server:
    """What a local server does, and the ranges (or whole files) that it was asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    version: str = '"1"'
    length: bool = True  # says how long a file is
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers end
    types: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        asked = request.headers.get("Range", "")
        hub = re.fullmatch(r"/[^/]+/[^/]+/resolve/main(/.+)", path)
        content = self.files.get(hub[1] if hub else path)
        if content is None:
            request.send_response(404)
            if hub:
                request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if self.ranges else None
        body = content[int(part[1]) : int(part[2] or len(content)) + 1] if part else content
        cut = len(body)
        if request.command == "GET" and asked != "bytes=0-0":
            self.asked.append(asked or "all")
            cut = self.cuts.pop(0) if self.cuts else cut
        request.send_response(206 if part else 200)
        if part:
            end = int(part[1]) + len(body) - 1
            request.send_header("Content-Range", f"bytes {part[1]}-{end}/{len(content)}")
        if self.length:
            request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Type", self.types.get(path, "application/octet-stream"))
        if self.version:
            request.send_header("ETag", self.version)
        if hub:
            request.send_header("X-Repo-Commit", HUB)
        request.end_headers()
        if request.command == "HEAD":
            return
        request.wfile.write(body[:cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server with net.pth, made the hub too; small chunks, no waiting between two tries."""
    monkeypatch.chdir(tmp_path)
    this = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            this.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # whoever asked hung up
            pass

    httpd = Quiet(("127.0.0.1", 0), Handler)
    this.address = f"http://127.0.0.1:{httpd.server_port}"
    torch.manual_seed(0)
    state = build_model("preact-resnet18", **NET).state_dict()
    spec = {"arch": "preact-resnet18", "act": "softplus1", **NET}
    torch.save({"spec": spec, "state_dict": state, "epoch": 1, "dataset": "digits"}, "net.pth")
    this.files["/nets/net.pth"] = Path("net.pth").read_bytes()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", this.address)
    template = this.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield this
    httpd.shutdown()
    httpd.server_close()


def kept(folder: str = "pretrained") -> list[str]:
    """Files that downloads left there."""
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_downloaded_once_and_then_found_without_the_server(server: Server) -> None:
    url = f"{server.address}/nets/net.pth"
    path = downloaded(url, Path("pretrained"))
    assert path.read_bytes() == server.files["/nets/net.pth"]
    assert re.fullmatch(r"net-[0-9a-f]{8}\.pth", path.name)
    assert kept() == [path.name]
    loaded = load_model(url, "pretrained", "digits")
    assert loaded.about["dataset"] == "digits"
    assert server.asked == ["all"]
    server.files.clear()
    assert downloaded(url, Path("pretrained")) == path


def test_equal_names_at_other_addresses_are_other_files(server: Server) -> None:
    torch.save({"a": torch.ones(2)}, "a.pth")
    server.files["/other/net.pth"] = Path("a.pth").read_bytes()
    found = {downloaded(f"{server.address}{place}/net.pth", Path("p")).read_bytes() for place in ("/nets", "/other")}
    assert found == set(server.files.values())
    # Names are part of the address; a query may be all that tells two files apart.
    server.files["/download"] = server.files["/other/net.pth"]
    paths = {downloaded(f"{server.address}/download?id={n}", Path("p")) for n in (1, 2)}
    assert len(paths) == 2
    server.files["/a b/../\N{SNOWMAN}.pth"] = server.files["/download"]
    odd = downloaded(f"{server.address}/a b/%2E%2E/%E2%98%83.pth", Path("p"))
    assert odd.parent == Path("p")


def test_sha256(server: Server) -> None:
    url, right = f"{server.address}/nets/net.pth", sha256(server.files["/nets/net.pth"])
    wrong = "0" * 64
    with pytest.raises(ValueError, match=f"{url} has SHA-256 {right}, not {wrong}"):
        downloaded(f"{url}#sha256={wrong}", Path("p"))
    assert kept("p") == []
    path = downloaded(f"{url}#sha256={right.upper()}", Path("p"))
    with pytest.raises(ValueError, match=f"{path} has SHA-256 {right}, not {wrong}"):
        downloaded(f"{url}#sha256={wrong}", Path("p"))
    assert kept("p") == [path.name]
    path.write_bytes(b"damaged")  # the digest is that of the kept file, each time
    with pytest.raises(ValueError, match=f"has SHA-256 {sha256(b'damaged')}, not {right}"):
        downloaded(f"{url}#sha256={right}", Path("p"))
    assert path.read_bytes() == b"damaged"
    for bad in ("#", "#sha256=", "#sha256=12", f"#md5={wrong}", f"#sha256={'g' * 64}", f"#sha256={wrong}0"):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            downloaded(url + bad, Path("p"))
    assert without_digest(f"{url}#sha256={wrong}") == url


def test_a_cut_connection_is_resumed_in_the_same_command(server: Server) -> None:
    server.cuts = [5000, 3000]
    path = downloaded(f"{server.address}/nets/net.pth", Path("p"))
    assert path.read_bytes() == server.files["/nets/net.pth"]
    assert server.asked == ["all", "bytes=5000-", "bytes=8000-"]


def test_an_early_end_leaves_a_part_that_the_next_command_resumes(server: Server) -> None:
    url = f"{server.address}/nets/net.pth"
    server.cuts = [5000] + [0] * 5
    with pytest.raises(ValueError, match=r"net\.pth could not be downloaded"):
        downloaded(url, Path("p"))
    [part] = kept("p")
    assert part.endswith(".part")
    assert (Path("p") / part).stat().st_size == 5000
    server.asked.clear()
    path = downloaded(url, Path("p"))
    assert server.asked == ["bytes=5000-"]
    assert path.read_bytes() == server.files["/nets/net.pth"]
    assert kept("p") == [path.name]


@pytest.mark.parametrize("change", ["another file", "no ranges", "no version", "longer than the file"])
def test_a_part_that_can_not_be_trusted_is_begun_again(change: str, server: Server) -> None:
    url = f"{server.address}/nets/net.pth"
    server.cuts = [5000] + [0] * 5
    with pytest.raises(ValueError, match="could not be downloaded"):
        downloaded(url, Path("p"))
    server.asked.clear()
    if change == "another file":
        torch.save({"a": torch.ones(9000)}, "a.pth")
        server.files["/nets/net.pth"], server.version = Path("a.pth").read_bytes(), '"2"'
    elif change == "longer than the file":
        [part] = kept("p")
        (Path("p") / part).write_bytes(bytes(10**6))
    server.ranges = change != "no ranges"
    server.version = "" if change == "no version" else server.version
    path = downloaded(url, Path("p"))
    assert path.read_bytes() == server.files["/nets/net.pth"]
    assert server.asked == ["all"]
    assert kept("p") == [path.name]


def test_a_whole_part_is_not_downloaded_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("models.downloads._check_part", ended)
        with pytest.raises(KeyboardInterrupt):
            downloaded(f"{server.address}/nets/net.pth", Path("p"))
    path = downloaded(f"{server.address}/nets/net.pth", Path("p"))
    assert server.asked == ["all"]
    assert kept("p") == [path.name]


def test_a_server_that_always_ends_early(server: Server) -> None:
    server.ranges, server.cuts = False, [5000] * 100
    with pytest.raises(ValueError, match="ends the download early, and cannot resume it"):
        downloaded(f"{server.address}/nets/net.pth", Path("p"))
    # One that does not say how long the file is: what came is not taken for the file.
    server.ranges, server.length, server.cuts = False, False, [5000]
    with pytest.raises(ValueError, match=r"net\.pth is not a checkpoint, or is damaged"):
        downloaded(f"{server.address}/nets/net.pth", Path("p"))
    assert kept("p") == []
    server.cuts = []
    assert downloaded(f"{server.address}/nets/net.pth", Path("p")).is_file()


PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
BAD: list[tuple[str, Callable[[Server], object], str]] = [
    ("/nets/absent.pth", lambda server: None, "the server answers 404"),
    ("/page", lambda server: server.files.update({"/page": PAGE}), "is a web page, not weights: take the link"),
    ("/typed.pth", lambda server: server.files.update({"/typed.pth": b"x"}), "is a web page"),
    ("/bad.pth", lambda server: server.files.update({"/bad.pth": b"\x80nothing"}), "is refused"),
    ("/text.pth", lambda server: server.files.update({"/text.pth": b"version https://git-lfs"}), "not a checkpoint"),
    ("/nets/net.pth#sha256=0", lambda server: None, "64 hexadecimal digits"),
    ("/nets/net.pth#sha256=" + "0" * 64, lambda server: None, "has SHA-256"),
    ("/nets/net.pth", lambda server: server.cuts.extend([0] * 6), "could not be downloaded"),
]  # fmt: skip


@pytest.mark.parametrize("script", [train, eval_script], ids=["train", "eval"])
@pytest.mark.parametrize(("path", "prepare", "says"), BAD, ids=[path for path, _, _ in BAD])
def test_what_goes_wrong_is_one_usage_error(script, path, prepare, says, server, capsys) -> None:  # type: ignore[no-untyped-def]
    prepare(server)
    server.types["/typed.pth"] = "text/html; charset=utf-8"
    flags = ["--dataset=digits", f"--model_name={server.address}{path}"]
    with pytest.raises(SystemExit) as stop:
        script.main(flags + ["--attack=apgd", "--finetune_model"] * (script is train))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert says in error
    assert "argument --model_name: " in error
    assert not [name for name in kept() if not name.endswith(".part")]
    assert not Path("runs").exists()


def test_no_server_no_host_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/net.pth"
    for url in (closed, "http://", "https://a b/net.pth", "http://127.0.0.1:99999/net.pth", "https://[/x.pth"):
        with pytest.raises(SystemExit) as stop:
            eval_script.main([f"--model_name={url}"])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1, url
        assert f"{url} could not be downloaded" in error
    assert not Path("pretrained").exists()


def test_two_processes_at_once_download_it_once(server: Server, launch: Callable[..., object]) -> None:
    url, flags = f"{server.address}/nets/net.pth", ("--dataset=digits", "--only_clean", "--n_ex=10", "--device=cpu")
    names = ("one", "two")
    runs = [
        launch(
            f"--model_name={url}", *flags, f"--save_dir={name}", script="eval", out=str(Path(f"{name}.txt").resolve())
        )
        for name in names
    ]
    for run in runs:
        run.join(300)  # type: ignore[attr-defined]
    assert [run.exitcode for run in runs] == [0, 0]  # type: ignore[attr-defined]
    assert server.asked == ["all"]
    said = [Path(f"{name}.txt").read_text() for name in names]
    assert sum("downloading" in each for each in said) == 1
    assert len(kept()) == 1
    [folder] = Path("one").iterdir()
    assert json.loads((folder / "eval.json").read_text())["settings"]["model_name"] == url


def test_the_hub(server: Server) -> None:
    server.files["/sub/dir/net.pth"] = data = server.files.pop("/nets/net.pth")
    name = "hf:someone/nets/sub/dir/net.pth"
    with pytest.raises(ValueError, match=f"has SHA-256 {sha256(data)}, not 0000"):
        downloaded(f"{name}#sha256={'0' * 64}", Path("p"))
    path = downloaded(f"{name}#sha256={sha256(data)}", Path("p"))
    assert path.read_bytes() == data
    assert path.is_relative_to("p")
    assert server.asked == ["all"]
    server.files.clear()
    assert downloaded(name, Path("p")) == path
    assert load_model(name, "p", "digits").about["dataset"] == "digits"


def test_the_hub_resumes_a_cut_connection(server: Server) -> None:
    server.cuts = [5000]
    assert downloaded("hf:someone/nets/nets/net.pth", Path("p")).read_bytes() == server.files["/nets/net.pth"]
    assert server.asked == ["all", "bytes=5000-"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:someone/nets/absent.pth", "answers 404"),
        ("hf:someone", "write hf:USER/REPO/FILE"),
        ("hf:someone/nets", "write hf:USER/REPO/FILE"),
        ("hf:someone/nets/", "write hf:USER/REPO/FILE"),
        ("hf:someone/nets/../net.pth", "write hf:USER/REPO/FILE"),
        ("hf:some one/nets/net.pth", "some one/nets"),
        ("hf:someone/nets/nets/net.pth#sha1=3", "64 hexadecimal digits"),
        ("hf:someone/nets/page.pth", "is not a checkpoint"),
    ],
)
def test_bad_names_of_the_hub_are_one_usage_error(name, says, server, capsys) -> None:  # type: ignore[no-untyped-def]
    server.files["/page.pth"] = PAGE
    with pytest.raises(SystemExit) as stop:
        eval_script.main(["--dataset=digits", f"--model_name={name}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert says in error


def test_a_network_of_ones_own_with_weights_by_address(server: Server) -> None:
    layers = "torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))"
    Path("nets.py").write_text(f"import torch\n\n\ndef make():\n    return {layers}\n")
    state = {"1.weight": torch.rand(10, 64), "1.bias": torch.rand(10)}
    server.files["/own.safetensors"] = safetensors_bytes(state, {})
    digest = sha256(server.files["/own.safetensors"])
    loaded = load_model(f"nets.py:make@{server.address}/own.safetensors#sha256={digest}", "p", "digits")
    assert torch.equal(loaded.model.state_dict()["1.weight"], state["1.weight"])
    assert loaded.spec["function"] == "nets.py:make"
    with pytest.raises(ValueError, match="answers 404"):
        load_model(f"nets.py:make@{server.address}/absent.pth", "p", "digits")


def test_a_name_without_a_suffix_is_read_by_its_content(server: Server) -> None:
    server.files["/download"] = safetensors_bytes({"a": torch.arange(3)}, {"epoch": 2})
    content = load_tensors(downloaded(f"{server.address}/download?file=net", Path("p")))
    assert content["epoch"] == 2
    assert torch.equal(content["state_dict"]["a"], torch.arange(3))
