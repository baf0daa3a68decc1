"""Names in pictures: matplotlib would read a dollar as mathematics, and leave out what its font lacks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from utils.text import printable


def picture_style() -> AbstractContextManager[None]:
    """Inside, matplotlib's own defaults, not the user's, and text is text: neither mathtext nor TeX."""
    import matplotlib.style  # here, since importing it takes a second

    return matplotlib.style.context(["default", {"text.parse_math": False, "text.usetex": False}])


def as_text(name: object, longest: int = 100) -> str:
    """A name as pictures show it: one line; a character that does not print, or that the font lacks, as an escape."""
    shown = printable(name, longest)
    return "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in shown)


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())
