"""Weights from a web server or the Hugging Face hub: whole or not at all, resumed where they were cut off, kept in --model_dir.

huggingface_hub does the downloading, of plain URLs too. Of what is installed, its `http_get` alone checks status and length, goes on
where a connection was cut, and begins again if a server answers a range with the whole file. gdown saves error pages and appends the
whole to the part; torch.hub takes what was cut off for the file.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from utils.checkpoint import load_tensors
from utils.resume import lock_run
from utils.run_folder import folder_name

SECONDS = 20.0  # to wait for a server's first answer
MARK = "#sha256="
HTML = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)


class _Unusable(ValueError):
    """What is wrong with what an address means, in full."""


class _PartFile(io.BufferedWriter):
    """A file that grows: `http_get` would cut it to nothing again and again, for ever, where a server ends early and has no ranges."""

    def truncate(self, pos: int | None = None, /) -> int:
        raise OSError("the server ends the download early, and cannot resume it")


def is_remote(name: str) -> bool:
    """Is it https://..., http://... or hf:USER/REPO/FILE?"""
    return name.startswith(("https://", "http://", "hf:"))


def without_digest(name: str) -> str:
    """A --model_name as a folder may be called: without #sha256=..."""
    return name.partition(MARK)[0]


def downloaded(name: str, model_dir: Path) -> Path:
    """The file that `name` (`is_remote`) means, in model_dir; a server is asked only if it is not there. Raises ValueError, of one line.

    NAME#sha256=HEX checks its digest. Processes that want the same file wait for the first one. Nothing that was downloaded is run.
    """
    source, hash_mark, digest = name.partition("#")
    if hash_mark and not re.fullmatch("sha256=[0-9a-fA-F]{64}", digest):
        raise ValueError(f"{name}: only {MARK} and 64 hexadecimal digits may stand behind the address")

    def check(path: Path) -> None:
        wanted, found = digest.removeprefix("sha256=").lower(), _sha256(path) if digest else ""
        if found != wanted:
            raise _Unusable(f"{path} has SHA-256 {found}, not {wanted} as asked for")

    get = _from_hub if source.startswith("hf:") else _from_server
    try:
        return get(source, model_dir, check)
    except _Unusable:
        raise
    except Exception as error:  # whatever the libraries and their sockets raise
        reason = error if isinstance(error, ValueError) else error.__cause__ or error
        first = next(iter(str(reason).splitlines()), type(error).__name__)
        raise ValueError(f"{source} could not be downloaded: {first}") from error


def _from_hub(source: str, model_dir: Path, check: Callable[[Path], None]) -> Path:
    """hf:USER/REPO/FILE, in the hub's own layout of a cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    parts = re.fullmatch(r"hf:([^/]+/[^/]+)/(.+)", source)
    if not parts or ".." in PurePosixPath(parts[2]).parts:
        raise _Unusable(f"{source} names no file: write hf:USER/REPO/FILE")
    try:
        path = try_to_load_from_cache(parts[1], parts[2], cache_dir=model_dir)
        if not isinstance(path, str):
            print(f"downloading {source}", flush=True)
            path = hf_hub_download(parts[1], parts[2], cache_dir=model_dir)
    except HfHubHTTPError as error:
        reason = f"{error.response.status_code} {error.response.reason_phrase}"
        raise _Unusable(f"{source}: {error.response.url.host} answers {reason}") from error
    check(Path(path))
    return Path(path)


def _from_server(url: str, model_dir: Path, check: Callable[[Path], None]) -> Path:
    """A file of any server, NAME-DIGEST.SUFFIX with a digest of the URL: many files have the same name."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    stem, suffix = (folder_name([part]) for part in (PurePosixPath(name).stem, PurePosixPath(name).suffix))
    path = model_dir / f"{stem[:100]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{f'.{suffix}' * bool(suffix)}"
    if not path.is_file():
        version, total, resumes = _ask(url)
        model_dir.mkdir(parents=True, exist_ok=True)
        with lock_run(model_dir, seconds=-1):  # without limit, and before there is a process group, too
            if not path.is_file():
                part = path.with_name(f"{path.name}.{version}.part")
                for old in model_dir.glob(f"{path.name}.*.part"):
                    if not (resumes and old == part and old.stat().st_size <= (total or 0)):
                        old.unlink()
                _fetch(url, part, path, total)
                try:
                    _check_part(url, part, check)
                except _Unusable:
                    part.unlink()
                    raise
                part.replace(path)
    check(path)
    return path


def _ask(url: str) -> tuple[str, int | None, bool]:
    """A word for the version of the file, its bytes if known, and whether a part of it could be resumed. Raises ValueError."""
    from huggingface_hub import get_session

    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=SECONDS) as response:
        said = response.headers
        if response.status_code >= 400:
            raise _Unusable(f"{url}: the server answers {response.status_code} {response.reason_phrase}")
        if said.get("Content-Type", "").startswith("text/html"):
            raise _web_page(url)
        ranges = response.status_code == 206
        size = said.get("Content-Range", "").rpartition("/")[2] if ranges else said.get("Content-Length", "")
        version = said.get("ETag") or said.get("Last-Modified") or ""
        total = int(size) if size.isdecimal() else None
        return hashlib.sha256(f"{version} {total}".encode()).hexdigest()[:8], total, ranges and bool(version)


def _fetch(url: str, part: Path, path: Path, total: int | None) -> None:
    """Append to `part` what is missing of the file. Raises OSError and httpx's errors; then the part stays, to be resumed."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import logging

    before: Any = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of each new try
    try:
        with _PartFile(part.open("ab", buffering=0)) as file:
            print(f"downloading {url} to {path}{f', from byte {file.tell()}' * bool(file.tell())}", flush=True)
            headers = {"Accept-Encoding": "identity"}
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=total)
    finally:
        logging.set_verbosity(before)


def _check_part(url: str, part: Path, check: Callable[[Path], None]) -> None:
    """Raises ValueError unless it is a file of tensors, with the wanted digest: not every server says how long a file is."""
    with part.open("rb") as file:
        if HTML.match(file.read(200)):
            raise _web_page(url)
    try:
        check(part)
        load_tensors(part)
    except ValueError as error:
        raise _Unusable(str(error).replace(str(part), url)) from error


def _web_page(url: str) -> _Unusable:
    return _Unusable(f"{url} is a web page, not weights: take the link that downloads the file itself")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
