"""A file of the user's, imported as `python FILE.py` would: its folder first, its own packages before ours of the same name."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# Top-level names of this program; a user's folder may have modules and packages of the same names.
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class OwnProject(MetaPathFinder, Loader):
    """`with project:` names of ours mean the user's modules where they have such, else ours; outside, ours alone.

    `attach` does the same in each forward pass of a network, so that imports inside functions find the same modules.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = root = file.resolve().parent  # as Python does for a script that is a link
        package = ""
        while (root / "__init__.py").is_file():  # the file is in a package: relative imports work, too
            package, root = f"{root.name}.{package}", root.parent
        taken = file.stem in sys.modules or file.stem in sys.stdlib_module_names
        self.name = f"{package}{'own_' if taken else ''}{file.stem}"
        self.path = list(dict.fromkeys([str(self.folder), str(root)]))
        self.theirs: dict[str, ModuleType] = {}  # the user's modules of our names, while they are not in sys.modules
        self.ours: dict[str, ModuleType] = {}  # ours, while the user's are there
        self.depth = 0

    def __enter__(self) -> OwnProject:
        self.depth += 1
        if self.depth == 1:
            self.ours, self.outer = _taken_out(), [entry for entry in sys.path if entry not in self.path]
            sys.modules.update(self.theirs)
            sys.path[:] = self.path + self.outer
            sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            sys.meta_path.remove(self)
            found = _taken_out()
            back = {name for name in found if self._is_ours(name, found)}
            self.theirs = {name: module for name, module in found.items() if name not in back}
            sys.modules.update(self.ours | {name: found[name] for name in back})
            # Behind the others from now on: processes that read images import ours, by the names that are theirs here.
            self.path = [entry for entry in sys.path if entry not in self.outer]
            sys.path[:] = self.outer + self.path

    def load(self) -> ModuleType:
        """The file as a module, with `with`. Raises whatever its code raises."""
        spec = importlib.util.spec_from_file_location(self.name, self.file.absolute())
        assert spec is not None
        assert spec.loader is not None
        # dataclasses and pickle look a class' module up in sys.modules.
        module = sys.modules[self.name] = importlib.util.module_from_spec(spec)
        try:
            with self:
                spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(self.name, None)
            raise
        return module

    def attach(self, model: nn.Module) -> nn.Module:
        """The model; if the user has modules of our names, its forward passes run inside `with` from now on."""
        if self.theirs:
            # As decorators they would cost every start of the program a second: torch loads its compiler for them.
            model.register_forward_pre_hook(torch.compiler.disable(self._before_forward))
            model.register_forward_hook(torch.compiler.disable(self._after_forward), always_call=True)
        return model

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        self.__enter__()

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.__exit__()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnProject:
        return self  # a copy of the network has the same modules

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """For a name of ours: the user's module of that name if sys.path has one, else our own, as it was."""
        if name not in OURS:
            return None
        found = PathFinder.find_spec(name, [entry for entry in sys.path if _is_users(entry)])
        if found and (found.origin or _has_code(found.submodule_search_locations)):
            return found
        return ModuleSpec(name, self) if name in self.ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Ours, already loaded."""
        self.spec = self.ours[spec.name].__spec__
        return self.ours[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: its submodules are put back."""
        module.__spec__ = self.spec
        sys.modules.update({name: self.ours[name] for name in self.ours if name.startswith(f"{module.__name__}.")})

    def _is_ours(self, name: str, found: dict[str, ModuleType]) -> bool:
        top = name.partition(".")[0]
        return top in self.ours and found.get(top) is self.ours[top]


def _taken_out() -> dict[str, ModuleType]:
    """Every loaded module of our names; they are not in sys.modules any more."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in OURS}


def _is_users(entry: str) -> bool:
    """Is it an entry of sys.path that is neither this program's nor the Python installation's?"""
    place = Path(entry).resolve()
    return place != ROOT and not str(place).startswith(INSTALLED)


def _has_code(folders: Any) -> bool:
    """A folder without __init__.py is a package of its own to Python; one of images is none to us."""
    return any(any(Path(folder).glob(pattern)) for folder in folders or () for pattern in ("*.py", "*/*.py"))
