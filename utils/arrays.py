"""Files of numpy arrays, read without running code: an npz is memory-mapped, a pickle is read into memory."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy


def load_arrays(path: Path, npz_names: list[str], pickle_names: list[str]) -> list[np.ndarray]:
    """The arrays of these names in a file, which is an npz or a pickle by its first bytes. Raises ValueError, OSError."""
    with path.open("rb") as file:
        is_npz = file.read(2) == b"PK"
    return mmap_npz(path, *npz_names) if is_npz else load_pickled_arrays(path, *pickle_names)


def mmap_npz(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names in an npz, read-only and memory-mapped: they may be far larger than the memory.

    Raises ValueError for one that is missing, compressed, of Python objects or damaged; OSError.
    """
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # whatever the parser raises, the file is what is wrong
            raise ValueError(f"{path} is not an npz file, or is damaged: {error}") from error
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        return [_mmap_member(path, file, archive, _entry(members, name, path)) for name in names]


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
        if not isinstance(value, _Array) or value.array is None:
            raise ValueError(f"{name!r} in {path} is not an array")
    return [value.array for value in found.values()]


def _entry(content: dict[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise ValueError(f"{path} has no array {name!r}, only {', '.join(map(repr, content)) or 'nothing'}")
    return content[name]


def _mmap_member(path: Path, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    where = f"{member.filename} in {path}"
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(
            f"{where} is compressed and can't be memory-mapped; "
            f"make an uncompressed copy: unzip {quote(str(path))} -d plain && (cd plain && zip -0 ../plain.npz *.npy)"
        )
    try:
        with archive.open(member):  # reads its header in the file, which may be longer than the zip's directory says
            start = file.tell()
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, fortran_order, dtype = read_header(file)
        offset = file.tell()
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise ValueError(f"{where} is not an array, or is damaged: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{where} holds Python objects; loading them could run code")
    if min(shape, default=1) < 0 or offset - start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{where} is damaged: {shape} entries of {dtype} don't fit its size")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


class _Dtype:
    """Stands in for numpy.dtype, of plain numbers: with numpy's own a hostile state makes it take numbers for addresses."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"it holds an array of {code!r}, only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray; `array` is None until __setstate__ or `from_buffer` gives it content."""

    array: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, content = state
        self.array = _Array.from_buffer(content, dtype, shape, "F" if fortran_order else "C").array

    @classmethod
    def from_buffer(cls, content: Any, dtype: _Dtype, shape: Any, order: Any, axes: Any = None) -> _Array:
        flat, made = np.frombuffer(_encode(content) if isinstance(content, str) else content, dtype.dtype), cls()
        made.array = (
            flat.reshape(shape, order="C").transpose(axes) if order == "K" else flat.reshape(shape, order=order)
        )
        return made


def _encode(text: str, *_: object) -> bytes:
    return text.encode("latin1")


_STAND_INS: dict[str, Any] = {  # the names by which numpy 1 pickles arrays
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda dtype, content: _Array.from_buffer(content, dtype, (), "C").array[()],
    "numpy.core.numeric._frombuffer": _Array.from_buffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,  # protocols up to 2 write bytes as its argument
}
NUMPY_STAND_INS = _STAND_INS | {name.replace("numpy.core.", "numpy._core."): each for name, each in _STAND_INS.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows these names and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        known = NUMPY_STAND_INS.get(f"{module}.{name}")
        if known is None:
            raise ValueError(f"it asks for {module}.{name}, which is refused because it could run code")
        return known
