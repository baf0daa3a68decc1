"""Names that people choose, as text: folders, classes, notes may hold line breaks, control characters and bytes that are no UTF-8."""

from __future__ import annotations

JOINERS = "\u200c\u200d"  # not printable in Python's eyes, but parts of words in Persian and of emoji


_NOTED: set[str] = set()


def note_once(text: str) -> None:
    """Print a note, in this process the first time alone."""
    if text not in _NOTED:
        _NOTED.add(text)
        print(f"note: {text}", flush=True)


def printable(text: object, longest: int = 1000) -> str:
    """str(text) on one line: what does not print as an escape such as \\n or \\udcff, and a long text without its middle."""
    shown = str(text)
    if len(shown) > longest:
        half = (longest - 3) // 2
        shown = f"{shown[:half]}...{shown[-half:]}"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode() for c in shown)


def markdown(text: object) -> str:
    """`printable` text as it is in Markdown, also in the cell of a table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in printable(text))
