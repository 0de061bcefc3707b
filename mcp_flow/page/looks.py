"""What this server has seen of the pages of runs, so that a later look can say what is different. No I/O."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mcp_flow.errors import InvalidInput
from mcp_flow.page.tree import Line
from mcp_flow.secrets import HIDDEN

Key: TypeAlias = tuple[str, str]
"""A run's id and the name of its page."""

LOOKS_KEPT = 8
LINES_KEPT = 100_000
"""In all pages together, some tens of megabytes; the page that nobody has looked at for longest goes first."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look: its number, the document it was of, its lines, and whether it showed the page as a whole."""

    number: int
    document: str
    lines: Sequence[Line]
    whole: bool


@dataclass(slots=True)
class _Page:
    looks: OrderedDict[int, Seen] = field(default_factory=OrderedDict)
    """By number, those last compared with at the end."""
    heard: dict[str, Sequence[Hashable]] = field(default_factory=dict)


class Looks:
    """The looks of one server process, a few for each page. Losing them costs an agent one more outline."""

    def __init__(self, lines_kept: int = LINES_KEPT) -> None:
        self._pages: OrderedDict[Key, _Page] = OrderedDict()
        self._numbers: Counter[Key] = Counter()
        self._lines_kept = lines_kept

    def last(self, key: Key, *, whole: bool = False) -> Seen | None:
        """The latest look at a page, or the latest that showed it as a whole."""
        return next((seen for seen in self._latest_first(key) if seen.whole or not whole), None)

    def numbered(self, key: Key, number: int) -> Seen:
        """The look of this number; raises `InvalidInput` where it is not remembered."""
        looks = self._latest_first(key)
        for seen in looks:
            if seen.number == number:
                # Whoever follows the calls of a long difference compares with the same look many times.
                self._pages[key].looks.move_to_end(number)
                return seen
        kept = ", ".join(str(seen.number) for seen in reversed(looks)) or "none"
        raise InvalidInput(
            f"Look {number} of this page is not remembered; remembered are: {kept}. Leave since out to compare "
            'with the last look, or take mode="outline" to see the whole.'
        )

    def line(self, key: Key, ref: str) -> Line | None:
        """The line under which the latest look that knew `ref` has shown it: what a stale ref once was."""
        for seen in self._latest_first(key):
            for line in seen.lines:
                if line.ref == ref:
                    return line
        return None

    def known(self, key: Key) -> Callable[[str], tuple[str, str | None] | None]:
        """Gives role and name of a ref, as the page has the name; none where it was hidden, cleaned or cut."""

        def found(ref: str) -> tuple[str, str | None] | None:
            line = self.line(key, ref)
            if line is None:
                return None
            altered = line.name is not None and (HIDDEN in line.name or line.name.endswith("…"))
            return line.role, None if altered else line.name

        return found

    def add(self, key: Key, document: str, lines: Sequence[Line], *, whole: bool) -> Seen:
        """Remember a look, under the next number of its page."""
        page = self._pages.setdefault(key, _Page())
        self._pages.move_to_end(key)
        self._numbers[key] += 1
        if (last := self.last(key)) and last.lines == lines:
            lines = last.lines  # kept once, however often the page is looked at
        seen = Seen(self._numbers[key], document, lines, whole)
        page.looks[seen.number] = seen
        while len(page.looks) > LOOKS_KEPT:
            page.looks.popitem(last=False)
        self._forget()
        return seen

    def news(self, key: Key, kind: str, held: Sequence[Hashable]) -> int:
        """How many at the end of `held`, a log that loses its oldest entries, are new since it was last given."""
        page = self._pages.setdefault(key, _Page())
        before = page.heard.get(kind, ())
        page.heard[kind] = held
        for lost in range(len(before) + 1):
            if list(before[lost:]) == list(held[: len(before) - lost]):
                return len(held) - (len(before) - lost)
        return len(held)

    def _latest_first(self, key: Key) -> list[Seen]:
        looks = self._pages[key].looks if key in self._pages else {}
        return [looks[number] for number in sorted(looks, reverse=True)]

    def _forget(self) -> None:
        kept = sum(len(seen.lines) for page in self._pages.values() for seen in page.looks.values())
        while kept > self._lines_kept:
            key, page = next(iter(self._pages.items()))
            if len(page.looks) > 1:
                kept -= len(page.looks.popitem(last=False)[1].lines)
            elif len(self._pages) > 1:
                kept -= sum(len(seen.lines) for seen in self._pages.pop(key).looks.values())
            else:
                return
