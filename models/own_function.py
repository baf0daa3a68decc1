"""Networks that a function of one's own makes: FILE.py:FUNCTION."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from models.own_project import ROOT, OwnProject

OPTIONAL = ("num_classes", "in_channels")  # known from the data set; a function need not take them


def split_own_function(name: str) -> tuple[str, str | None] | None:
    """FILE.py:FUNCTION and CHECKPOINT (None if there is none) of FILE.py:FUNCTION[@CHECKPOINT]; None for any other name."""
    found = re.fullmatch(r"(.+\.py):(\w+)(?:@(.+))?", name)
    return (f"{Path(found[1])}:{found[2]}", found[3]) if found else None


def build_own_function(name: str, **kwargs: Any) -> nn.Module:
    """The network that the function `name`, FILE.py:FUNCTION, makes of those of num_classes and in_channels that it takes, and of the rest.

    Raises ValueError of one line: for a missing file or function, parameters that can't be met, an error inside the file (with its
    place) and a result that is no torch.nn.Module.
    """
    path, _, function_name = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {file} to take the function {function_name} from")
    project = OwnProject(file)
    function = getattr(_located(file, project.load), function_name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {function_name}")
    arguments = _arguments(function, name, kwargs)
    with project:
        model = _located(file, lambda: function(**arguments))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function_name} in {file} must return a torch.nn.Module, it returned {type(model).__name__}")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError(f"{function_name} in {file} has lazy layers: run it on an image once before you return it")
    return project.attach(model)


def _arguments(function: Callable[..., Any], name: str, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that the function takes. Raises ValueError if it needs others, or can't take what was asked for."""
    # A class without __init__ of its own has torch.nn.Module's, which seems to take anything and takes nothing.
    takes_nothing = getattr(function, "__init__", None) is nn.Module.__init__
    parameters = [] if takes_nothing else [*inspect.signature(function).parameters.values()]
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    passed = {key: value for key, value in offered.items() if takes_any or key in by_name}
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed := [parameter for parameter in required if parameter not in passed]:
        given = f"passed by name are {', '.join(offered) or 'none'}: give the rest default values"
        raise ValueError(f"{name} needs {', '.join(needed)}; {given}")
    if refused := sorted(offered.keys() - passed.keys() - {*OPTIONAL}):
        raise ValueError(f"{name} takes no {' or '.join(refused)}; leave --{' and --'.join(refused)} out")
    return passed


def _located(file: Path, call: Callable[[], Any]) -> Any:
    """call(); what it raises becomes a ValueError of one line that names the place in the user's file."""
    try:
        return call()
    except Exception as error:  # whatever a user's code raises
        folder = file.resolve().parent
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):  # which has no frame where it is
            places.append((error.filename or "", error.lineno))
        inside = [(name, line) for name, line in places if _is_theirs(Path(name).resolve(), folder)]
        name, line = inside[-1] if inside else (str(file), None)
        shown = file if Path(name).resolve() == file.resolve() else Path(name)
        place = f"{shown}, line {line}" if line else str(shown)
        raise ValueError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _is_theirs(place: Path, folder: Path) -> bool:
    """Is it a file in the user's folder, and no part of this program or of an environment that lies there?"""
    ours = place.is_relative_to(ROOT) and not folder.is_relative_to(ROOT)
    return place.is_relative_to(folder) and not ours and "site-packages" not in place.parts
