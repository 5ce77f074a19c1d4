"""What the demo prints: lines in the user's language, a progress bar, two answers side by side. Knows no API."""

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import TextIO

NARROWEST_COLUMN = 30  # below this two columns read worse than one after the other
BAR_CELLS = 24


class Screen:
    """On a terminal the progress line is drawn again and again; elsewhere every tenth of the way is a line."""

    def __init__(self, out: TextIO, *, width: int, is_terminal: bool, korean: bool) -> None:
        self._out = out
        self._width = width
        self._is_terminal = is_terminal
        self._korean = korean
        self._tenth = -1

    def pick(self, english: str, korean: str) -> str:
        return korean if self._korean else english

    def say(self, english: str = "", korean: str | None = None) -> None:
        self._out.write((korean if self._korean and korean is not None else english) + "\n")
        self._out.flush()

    def waiting(self, text: str) -> None:
        """A line that the next one writes over; nothing where that can't be done."""
        if self._is_terminal:
            self._out.write("\r\033[K" + text[: self._width - 1])
            self._out.flush()

    def wipe(self) -> None:
        self.waiting("")

    def progress(self, step: int, total: int, loss: float | None, eta_s: float | None) -> None:
        line = progress_line(step, total, loss, eta_s)
        tenth = 10 * step // max(total, 1)
        if self._is_terminal:
            self.waiting(line)
        elif tenth != self._tenth:
            self.say(line)
        self._tenth = tenth

    def answer(self, title: str, text: str) -> None:
        self.say(f"  {title}:")
        self.say(textwrap.indent("\n".join(wrap(text, self._width - 4)), "    "))

    def side_by_side(self, left: tuple[str, str], right: tuple[str, str]) -> None:
        """Two texts with a title each: in columns on a terminal that is wide enough, else one after the other."""
        column = (self._width - 7) // 2
        if not self._is_terminal or column < NARROWEST_COLUMN:
            self.answer(*left)
            self.answer(*right)
            return
        columns = [[title, "─" * min(cells(title), column), *wrap(text, column)] for title, text in (left, right)]
        height = max(map(len, columns))
        for a, b in zip(*(lines + [""] * (height - len(lines)) for lines in columns), strict=True):
            self.say(f"  {a}{' ' * (column - cells(a))}   {b}".rstrip())


def of_terminal(env: Mapping[str, str] = os.environ) -> Screen:
    locale = env.get("LC_ALL") or env.get("LC_MESSAGES") or env.get("LANG") or ""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't draw the bar still gets the figures
    return Screen(
        sys.stdout,
        width=min(shutil.get_terminal_size((100, 24)).columns, 140),
        is_terminal=sys.stdout.isatty() and env.get("TERM") != "dumb",
        korean=locale.startswith("ko"),
    )


def progress_line(step: int, total: int, loss: float | None, eta_s: float | None) -> str:
    done = BAR_CELLS * step // max(total, 1)
    line = f"  [{'█' * done}{'·' * (BAR_CELLS - done)}] {step}/{total}"
    if loss is not None:
        line += f"  loss {loss:.3f}"
    if eta_s is not None:
        line += f"  ETA {int(eta_s) // 60}:{int(eta_s) % 60:02d}"
    return line


def wrap(text: str, width: int) -> list[str]:
    """The text's own line breaks stay."""
    return [line for paragraph in text.strip().splitlines() for line in textwrap.wrap(paragraph, width) or [""]]


def cells(text: str) -> int:
    """Columns of a terminal that the text takes: two for each Korean or other wide character."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
