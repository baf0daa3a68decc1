"""Files of numpy arrays, read without running code: an npz is mmap_npz where it lies, a pickle is read into memory."""

from __future__ import annotations

import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.lib import format as npy


def is_npz(path: Path) -> bool:
    """Does the file begin as an npz does? Raises OSError."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def mmap_npz(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names in an npz, read-only and mmap_npz: they may be far larger than the memory.

    Raises ValueError for one that is missing, compressed, of Python objects or damaged; OSError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except Exception as error:  # whatever the parser meets, the file is what is wrong
        raise ValueError(f"{path} is not an npz file, or is damaged: {error}") from error
    return [_mapped(path, members[_there(name, members, path)]) for name in names]


def load_pickled_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of numbers of these names in a pickled dictionary, in memory.

    Whatever the pickle asks for, none but the functions of this file is called. Raises ValueError, OSError.
    """
    with path.open("rb") as file:
        try:
            content = _Unpickler(file, encoding="latin1").load()  # Python 2's strings are bytes
        except Exception as error:  # as above
            raise ValueError(f"{path} can't be read as a pickle of arrays: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of arrays")
    found = [content[_there(name, content, path)] for name in names]
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, _Array) or value.array is None:
            raise ValueError(f"{name!r} in {path} is not an array")
    return [value.array for value in found]


def _there(name: str, content: dict[str, Any], path: Path) -> str:
    if name not in content:
        raise ValueError(f"{path} has no array {name!r}, only {', '.join(map(repr, content)) or 'nothing'}")
    return name


def _mapped(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(
            f"{member.filename} in {path} is compressed, which can't be mmap_npz; "
            f"make an uncompressed copy: unzip {quote(str(path))} -d plain && (cd plain && zip -0 ../plain.npz *.npy)"
        )
    try:
        with path.open("rb") as file:
            # A member lies behind a header of its own, whose fields may be longer than the directory says.
            file.seek(member.header_offset)
            signature, *lengths = struct.unpack("<4s22xHH", file.read(30))
            if signature != b"PK\3\4":
                raise ValueError("no header where the directory says")
            begin = file.seek(sum(lengths), 1)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, by_columns, dtype = read(file)
            offset = file.tell()
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise ValueError(f"{member.filename} in {path} is not an array, or is damaged: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{member.filename} in {path} holds Python objects; loading them could run code")
    if min(shape, default=1) < 0 or offset - begin + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} in {path} is damaged: {shape} entries of {dtype} don't fit its size")
    return np.memmap(path, dtype, "r", offset, shape, "F" if by_columns else "C")


class _Unpickler(pickle.Unpickler):
    """Puts the stand-ins below in the place of what numpy pickles an array by, and refuses all else.

    numpy's own functions would not do: a hostile dtype makes them take numbers for addresses.
    """

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core.", "numpy.core."), name:  # the names of numpy 2 and 1
            case "numpy.core.multiarray", "_reconstruct":
                return _reconstruct
            case "numpy.core.multiarray", "scalar":
                return _scalar
            case "numpy.core.numeric", "_frombuffer":
                return _from_buffer
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return _Type
            case "_codecs", "encode":
                return _encode
        raise ValueError(f"it asks for {module}.{name}, which is refused because it could run code")


class _Type:
    """A dtype of plain numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"it holds an array of {code!r}, only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array, as yet without content."""

    array: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.array = _from_buffer(content, kind, shape, "F" if by_columns else "C").array


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(
    content: Any, kind: _Type, shape: tuple[int, ...], order: Any, axes: tuple[int, ...] | None = None
) -> _Array:
    made = _Array()
    flat = np.frombuffer(_encode(content) if isinstance(content, str) else content, kind.dtype)
    made.array = flat.reshape(shape, order="C").transpose(axes) if order == "K" else flat.reshape(shape, order=order)
    return made


def _scalar(kind: _Type, content: Any) -> Any:
    return _from_buffer(content, kind, (), "C").array[()]


def _encode(text: str, *_: object) -> bytes:
    """What protocols up to 2 make bytes of."""
    return text.encode("latin1")
