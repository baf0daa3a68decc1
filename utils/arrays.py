"""Files of numpy arrays, read without running code: an npz is memory-mapped, a pickle is read into memory."""

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
    """The arrays of these names in an npz, read-only and memory-mapped: they may be far larger than the memory.

    Raises ValueError for one that is missing, compressed, of Python objects or damaged; OSError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except Exception as error:  # whatever the parser raises, the file is what is wrong
        raise ValueError(f"{path} is not an npz file, or is damaged: {error}") from error
    return [_mmap_member(path, _entry(members, name, path)) for name in names]


def load_pickled_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of numbers of these names in a pickled dictionary, in memory.

    Whatever the pickle asks for, only functions of this file are called. Raises ValueError, OSError.
    """
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="latin1").load()  # Python 2's strings are bytes
        except Exception as error:  # as above
            raise ValueError(f"{path} can't be read as a pickle of arrays: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of arrays")
    found = {name: _entry(content, name, path) for name in names}
    for name, value in found.items():
        if not isinstance(value, _PickledArray) or value.array is None:
            raise ValueError(f"{name!r} in {path} is not an array")
    return [value.array for value in found.values()]


def _entry(content: dict[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise ValueError(f"{path} has no array {name!r}, only {', '.join(map(repr, content)) or 'nothing'}")
    return content[name]


def _mmap_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(
            f"{member.filename} in {path} is compressed and can't be memory-mapped; "
            f"make an uncompressed copy: unzip {quote(str(path))} -d plain && (cd plain && zip -0 ../plain.npz *.npy)"
        )
    try:
        with path.open("rb") as file:
            # A member has a header of its own, whose fields may be longer than the zip's directory says.
            file.seek(member.header_offset)
            signature, *lengths = struct.unpack("<4s22xHH", file.read(30))
            if signature != b"PK\3\4":
                raise ValueError("no header where the directory says")
            start = file.seek(sum(lengths), 1)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, fortran_order, dtype = read_header(file)
            offset = file.tell()
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise ValueError(f"{member.filename} in {path} is not an array, or is damaged: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{member.filename} in {path} holds Python objects; loading them could run code")
    if min(shape, default=1) < 0 or offset - start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} in {path} is damaged: {shape} entries of {dtype} don't fit its size")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


# What numpy pickles an array by is replaced by the stand-ins below: with numpy's own functions a hostile dtype makes them take
# numbers for addresses.


class _PickledDtype:
    """A dtype of plain numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"it holds an array of {code!r}, only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """An array, without content until __setstate__ is called."""

    array: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, content = state
        self.array = _from_buffer(content, dtype, shape, "F" if fortran_order else "C").array


def _from_buffer(
    content: Any, dtype: _PickledDtype, shape: tuple[int, ...], order: Any, axes: tuple[int, ...] | None = None
) -> _PickledArray:
    made = _PickledArray()
    flat = np.frombuffer(_encode(content) if isinstance(content, str) else content, dtype.dtype)
    made.array = flat.reshape(shape, order="C").transpose(axes) if order == "K" else flat.reshape(shape, order=order)
    return made


def _scalar(dtype: _PickledDtype, content: Any) -> Any:
    return _from_buffer(content, dtype, (), "C").array[()]


def _encode(text: str, *_: object) -> bytes:
    """Protocols up to 2 write bytes as the argument of this function."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows the stand-ins and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        key = module.replace("numpy._core.", "numpy.core."), name  # the names of numpy 2 and 1
        if key not in _STAND_INS:
            raise ValueError(f"it asks for {module}.{name}, which is refused because it could run code")
        return _STAND_INS[key]
