"""What both scripts' command lines share: flags with - or _, lists as strings with blanks, one-line usage errors."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        print(f"{self.prog}: error: {one_line} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)

    @contextmanager
    def blame(self, flag: str) -> Iterator[None]:
        """A ValueError or OSError raised inside becomes a usage error of `flag`."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(f"argument {flag}: {error}")


def add_flag(group: Any, name: str, **kwargs: Any) -> None:
    """Add `--name` to an argparse group; its twin with - and _ exchanged is accepted too, and not listed in --help."""
    bare = name.removeprefix("--")
    dest = bare.replace("-", "_")
    group.add_argument(name, dest=dest, **kwargs)
    twins = {f"--{dest}", f"--{dest.replace('_', '-')}"} - {name}
    if twins:
        group.add_argument(
            *sorted(twins), dest=dest, **(kwargs | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS})
        )


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text!r}")
    return int(text)


def natural_int(text: str) -> int:
    """A whole number of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"give a whole number of at least 0, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0, also as a fraction."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"give a number above 0, not {text!r}")
    return value


def share_of_one(text: str) -> float:
    """A number between 0 and 1, neither included."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"give a number between 0 and 1, not {text!r}")
    return value


def natural_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"give a number of at least 0, not {text!r}")
    return value


def float_list(text: str) -> list[float]:
    """Numbers above 0 with blanks between, also as fractions: '8/255 0.5 12'."""
    return [positive_float(part) for part in _parts(text)]


def int_list(text: str) -> list[int]:
    """Whole numbers of at least 1 with blanks between."""
    return [positive_int(part) for part in _parts(text)]


def word_list(text: str) -> list[str]:
    """Words with blanks between."""
    return _parts(text)


def _parts(text: str) -> list[str]:
    if not text.split():
        raise argparse.ArgumentTypeError("give at least one value")
    return text.split()


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"give a number or a fraction such as 8/255, not {text!r}")
    return value
