"""Command lines from dataclasses: a flag for each field, - and _ alike, lists as strings with blanks, one-line usage errors."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, field, fields
from typing import Any, NoReturn


class UsageError(ValueError):
    """What is wrong with a flag, and what to do."""

    def __init__(self, flag: str, message: object) -> None:
        super().__init__(f"argument {flag}: {message}")


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """A ValueError or OSError raised inside becomes a UsageError of `flag`."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(flag, error) from error


@contextmanager
def usage_errors(prog: str) -> Iterator[None]:
    """A UsageError raised inside ends the program with one line and exit code 2."""
    try:
        yield
    except UsageError as error:
        _exit(prog, str(error))


def _exit(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())} (--help lists the flags)", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        _exit(self.prog, message)


def flag(
    group: str, default: Any, text: str | Callable[[], str], kind: Callable[[str], Any] | None = None, **more: Any
) -> Any:
    """A dataclass field that is a flag of this group in --help; False as default makes a switch.

    text: the help, which ends with the default in parentheses; (=) stands for it. kind: argparse's type.
    more: `resumable` (may change when a run is resumed), `dashed` (--help spells it with -), and argparse's own arguments.
    """
    return field(default=default, metadata={"group": group, "help": text, "type": kind} | more)


def add_fields(parser: argparse.ArgumentParser, config: type[Any], groups: Sequence[str]) -> None:
    """A flag for each field of a dataclass, in these groups, without defaults: what is not given is not in the namespace."""
    sections = {group: parser.add_argument_group(group) for group in groups}
    for each in fields(config):
        if "group" in each.metadata:
            name, arguments = _argument(each)
            add_flag(sections[each.metadata["group"]], name, **arguments)


def _argument(each: Field[Any]) -> tuple[str, dict[str, Any]]:
    """Name and argparse's arguments of a flag."""
    arguments = {k: v for k, v in each.metadata.items() if k not in ("group", "resumable", "dashed") and v is not None}
    arguments["default"] = argparse.SUPPRESS
    if each.default is False:
        arguments["action"] = "store_true"
    shown = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    text = arguments["help"]
    arguments["help"] = (text() if callable(text) else text).replace("(=", f"({shown}").replace("%", "%%")
    return "--" + (each.name.replace("_", "-") if each.metadata.get("dashed") else each.name), arguments


def add_flag(group: Any, name: str, **kwargs: Any) -> None:
    """Add `--name` to an argparse group; its twin with - and _ exchanged is accepted too, and not listed in --help."""
    dest = name.removeprefix("--").replace("-", "_")
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


def non_negative_int(text: str) -> int:
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


def fraction(text: str) -> float:
    """A number between 0 and 1, neither included."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"give a number between 0 and 1, not {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"give a number of at least 0, not {text!r}")
    return value


def floats(text: str) -> tuple[float, ...]:
    """Numbers above 0 with blanks between, also as fractions: '8/255 0.5 12'."""
    return tuple(positive_float(part) for part in words(text))


def ints(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 with blanks between."""
    return tuple(positive_int(part) for part in words(text))


def words(text: str) -> tuple[str, ...]:
    """Words with blanks between."""
    if not text.split():
        raise argparse.ArgumentTypeError("give at least one value")
    return tuple(text.split())


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"give a number or a fraction such as 8/255, not {text!r}")
    return value
