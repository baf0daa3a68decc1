"""Imported first by the scripts: one line instead of a traceback where Python lacks their packages. Needs the standard library alone."""

import sys
from importlib.util import find_spec

NEEDED = ("torch", "torchvision", "numpy", "gdown", "filelock", "tqdm", "matplotlib", "jinja2", "sklearn")

if missing := [name for name in NEEDED if find_spec(name) is None]:
    sys.exit(
        f"{sys.executable} lacks {', '.join(missing)}. If `make demo` or `make test` has made an environment here: "
        "source .venv/bin/activate. Else: pip install -r requirements.txt"
    )
