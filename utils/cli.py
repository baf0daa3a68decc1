"""Command lines from dataclasses: a flag for each field, - and _ alike, lists as strings with blanks, one-line usage errors."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import Any, NoReturn

from utils.signals import Signals
from utils.text import printable

DECIMAL = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"  # less than float() takes: no nan, inf, 1_000
LONGEST_PATH, MOST_VALUES = 4096, 1000  # characters, Linux' PATH_MAX; values of a list


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
    """A UsageError raised inside ends the program with one line and exit code 2. What the console can't show is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UsageError as error:
        _exit(prog, str(error))


@contextmanager
def one_line_end(prog: str, signals: Signals, argv: Sequence[str] | None) -> Iterator[list[Path]]:
    """Inside, what ends the program early becomes one line, with how to go on once the list has the result's folder.

    Exit code 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP, else 1: a full disk, an exception in one's own network.
    """
    folders: list[Path] = []
    try:
        with signals.at_once():
            yield folders
    except (UsageError, SystemExit):
        raise
    except BaseException as error:
        number = signals.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        folder = folders[0] if folders else None
        what = signal.Signals(number).name if number else described(error, folder)
        kept = f"what was found is kept in {folders[0]}; go on with: " if folders else "nothing was begun"
        how = kept + (_again(prog, argv) if folders else "")
        if not number or os.environ.get("RANK", "0") == "0":  # a signal as a rule comes to all processes
            print(f"{prog}: {printable(' '.join(what.split()), 500)}; {printable(how, 5000)}", file=sys.stderr)
        raise SystemExit(128 + number if number else 1) from error


def _again(prog: str, argv: Sequence[str] | None) -> str:
    """The same command, with --resume."""
    flags = [*(sys.argv[1:] if argv is None else argv)]
    program = f"torchrun ... {prog}" if "WORLD_SIZE" in os.environ else f"python {prog}"
    return f"{program} {shlex.join(flags if '--resume' in flags else [*flags, '--resume'])}"


def described(error: BaseException, folder: Path | None = None) -> str:
    """An exception in words, with the place where it began, the innermost that is not in an installed package.

    Its traceback goes to error.txt in the folder. What the system says of files, such as a full disk, needs neither.
    """
    if isinstance(error, OSError):
        return str(error)
    if folder:
        with suppress(OSError):
            (folder / "error.txt").write_text("".join(format_exception(error)))
    first = error
    while first.__cause__:
        first = first.__cause__
    frames = [each for each in extract_tb(first.__traceback__) if "site-packages" not in each.filename]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}"
    return f"{type(error).__name__}: {error} ({place}{f'; all of it in {folder}/error.txt' if folder else ''})"


def _exit(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {printable(' '.join(message.split()))} (--help lists the flags)", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; before Python 3.13 that takes `--flag=--` for no value at all, and says nothing."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.option_strings and action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {action.option_strings[0]}: expected one argument")
        return found, rest

    def error(self, message: str) -> NoReturn:
        _exit(self.prog, message)


def flag(
    group: str, default: Any, text: str | Callable[[], str], kind: Callable[[str], Any] | None = None, **more: Any
) -> Any:
    """A dataclass field that is a flag of this group in --help; False as default makes a switch.

    text: the help, which ends with the default in parentheses; (=) stands for it. kind: argparse's type (`text`, a path or a name).
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
    if kind := kind_of(each):
        arguments["type"] = kind
    if each.default is False:
        arguments["action"] = "store_true"
    shown = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    text = arguments["help"]
    arguments["help"] = (text() if callable(text) else text).replace("(=", f"({shown}").replace("%", "%%")
    return "--" + (each.name.replace("_", "-") if each.metadata.get("dashed") else each.name), arguments


def kind_of(each: Field[Any]) -> Callable[[str], Any] | None:
    """argparse's type of the flag; None for a switch and for one with choices."""
    kind = each.metadata.get("type")
    return kind or (None if each.default is False or "choices" in each.metadata else text)


def add_flag(group: Any, name: str, **kwargs: Any) -> None:
    """Add `--name` to an argparse group; its twin with - and _ exchanged is accepted too, and not listed in --help.

    --help shows the limits of a number in the place of its value: --epochs 1..1000000.
    """
    if isinstance(kwargs.get("type"), Number):
        kwargs["metavar"] = kwargs["type"].range
    dest = name.removeprefix("--").replace("-", "_")
    group.add_argument(name, dest=dest, **kwargs)
    twins = {f"--{dest}", f"--{dest.replace('_', '-')}"} - {name}
    if twins:
        group.add_argument(
            *sorted(twins), dest=dest, **(kwargs | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS})
        )


@dataclass(frozen=True)
class Number:
    """argparse's type of a number within limits, or of several with blanks between, which it returns as a tuple."""

    low: float  # whole numbers alone if it is an int
    high: float
    ends: bool = True  # the limits themselves are allowed
    several: bool = False

    @property
    def range(self) -> str:
        """For --help: 1..100, and >0..<1 without the ends."""
        low, high = (format(end, "" if isinstance(end, int) else "g") for end in (self.low, self.high))
        return (f"{low}..{high}" if self.ends else f">{low}..<{high}") + (" ..." if self.several else "")

    def __call__(self, text: str) -> Any:
        """The number. Raises ArgumentTypeError."""
        return tuple(map(self._one, words(text))) if self.several else self._one(text)

    def _one(self, text: str) -> float:
        whole, low, high = isinstance(self.low, int), f"{self.low:g}", f"{self.high:g}"
        limits = f"of at least {low} and at most {high}" if self.ends else f"above {low} and below {high}"
        if whole:
            limits = f"of at least {self.low} and at most {self.high}"
        value = _whole(text) if whole else _number(text)
        if value is None:
            kind = f"whole number {limits}" if whole else "number or a fraction such as 8/255"
            raise argparse.ArgumentTypeError(f"give a {kind}, not {_quoted(text)}")
        if not (self.low <= value <= self.high and (self.ends or self.low < value < self.high)):
            raise argparse.ArgumentTypeError(f"give a {'whole ' if whole else ''}number {limits}, not {_quoted(text)}")
        return value


def between(low: float, high: float, several: bool = False) -> Number:
    """Numbers from low to high; whole ones if low is an int."""
    return Number(low, high, several=several)


def inside(low: float, high: float, several: bool = False) -> Number:
    """Numbers above low and below high, also as fractions."""
    return Number(low, high, ends=False, several=several)


def name_or(names: Sequence[str], numbers: Number) -> Callable[[str], Any]:
    """argparse's type of a name among these, or of numbers."""

    def parse(text: str) -> Any:
        try:
            return text if text in names else numbers(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; or one of {' '.join(names)}") from None

    return parse


# For numbers without a limit of their own; beyond these they are a slip.
positive_int, non_negative_int = between(1, 10**9), between(0, 10**9)
positive_float, non_negative_float, fraction = inside(0.0, 1e12), between(0.0, 1e12), inside(0.0, 1.0)
floats, ints = inside(0.0, 1e12, several=True), between(1, 10**9, several=True)


def words(text: str) -> tuple[str, ...]:
    """Words with blanks between."""
    found = tuple(text.split())
    if not 1 <= len(found) <= MOST_VALUES:
        raise argparse.ArgumentTypeError(f"give at least one value and at most {MOST_VALUES}, not {len(found)}")
    return found


def text(value: str) -> str:
    """A path or a name."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty, give a value or leave the flag out")
    return text_or_nothing(value)


def text_or_nothing(value: str) -> str:
    """A path or a name, or an empty one, which stands for none."""
    if len(value) > LONGEST_PATH or "\0" in value:
        raise argparse.ArgumentTypeError(f"give at most {LONGEST_PATH} characters, and no NUL")
    return value


def _whole(text: str) -> int | None:
    """None if it is no whole number, in ASCII digits; one of more digits than any limit has is cut to 30."""
    digits = re.fullmatch("0*([0-9]+)", text.strip(" "))
    return int(digits[1][:30]) if digits else None


def _number(text: str) -> float | None:
    """A decimal number or a fraction of two; None if it is neither."""
    parts = text.strip(" ").split("/")
    if len(text) > 100 or len(parts) > 2 or not all(re.fullmatch(DECIMAL, part) for part in parts):
        return None
    try:
        return float(parts[0]) / float("1" if len(parts) == 1 else parts[1])
    except ZeroDivisionError:
        return None


def _quoted(text: str) -> str:
    return repr(printable(text, 60))
