"""The lines of a page's snapshot: parsed, addressed, condensed and folded. Pure.

A line is known by its index in one capture and by its ref across captures. A place is named by the nearest ref at
or before it and the number of lines from there, `e12+3`, so that lines without a ref can be asked for as well.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mcp_flow.errors import InvalidInput

CONTROLS = frozenset(
    [
        "button",
        "link",
        "textbox",
        "searchbox",
        "combobox",
        "listbox",
        "option",
        "checkbox",
        "radio",
        "switch",
        "slider",
        "spinbutton",
        "menuitem",
        "menuitemcheckbox",
        "menuitemradio",
        "tab",
        "treeitem",
    ]
)
"""The roles of what can be acted on; anything else can be where its cursor is a pointer."""
SHORTEST_RUN = 10
"""So many siblings that are alike are folded."""
SHOWN_OF_RUN = 4
"""So many of them are shown."""

_WRAPPERS = frozenset({"generic", "none", "presentation"})
_PLAIN = _WRAPPERS | frozenset(
    ["text", "paragraph", "strong", "emphasis", "code", "img", "time", "mark", "superscript", "subscript"]
)
"""Roles that make no difference between two siblings: one card has a picture or a note, the next has none."""

_ITEM = re.compile(
    r"( *)- (?:(/?[a-z-]+)"
    r'(?: ("[^"\\]*(?:\\.[^"\\]*)*"))?'
    r"((?: \[(?!ref=)[^\]]*\])*)"
    r"(?: \[ref=((?:f\d+)?e\d+)\])?"
    r"((?: \[[^\]]*\])*)"
    r":?(?: (.*))?)"
)
_KEY = re.compile(r"( *- )'((?:[^']|'')*)'(.*)")
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|.)")
_PLACE = r"((?:f\d+)?e\d+)?(?:\+(\d{1,6}))?"
_ROOT = re.compile(rf"{_PLACE}(\.\.)?{_PLACE}")


class Line(NamedTuple):
    """One line, `- role "name" [ref=e12]: text`; `parent` is the index of the line it stands under, or -1.

    A named tuple, because a page has thousands of them and they are made in a third of the time.
    """

    depth: int
    parent: int
    role: str
    name: str | None
    states: str
    ref: str | None
    pointer: bool
    text: str | None

    @property
    def acts(self) -> bool:
        """Whether it can be acted on."""
        return self.ref is not None and (self.pointer or self.role in CONTROLS)

    def shown(self, *, text: str | None = None, limit: int = 0, flat: bool = False) -> str:
        """The line without indentation; `limit` shortens name and text, never the ref."""
        parts = [f"- {self.role}"]
        if self.name is not None:
            parts.append(" " + json.dumps(shortened(self.name, limit), ensure_ascii=False))
        parts.append(self.states)
        if self.ref is not None:
            parts.append(f" [ref={self.ref}]")
        if self.pointer and not flat and self.role not in CONTROLS:
            parts.append(" [cursor=pointer]")
        said = self.text if text is None else text
        if said is not None:
            parts.append(": " + shortened(said, limit))
        return "".join(parts)


def shortened(text: str, limit: int) -> str:
    """`text`, or where it is longer than `limit` its beginning and how many characters are missing; 0 is no limit."""
    return text if not limit or len(text) <= limit else f"{text[:limit]}…(+{len(text) - limit})"


def parse(snapshot: str, said: Callable[[str], str] = str) -> list[Line]:
    """The lines of Playwright's snapshot in `ai` mode; `said` is applied to names and texts, which the page wrote."""
    lines: list[Line] = []
    above: list[int] = []
    for raw in snapshot.split("\n"):
        item = raw
        if "- '" in raw and (key := _KEY.fullmatch(raw)):
            # A key with a colon or a hash in its name is quoted as YAML; agents read one form more easily than two.
            item = key[1] + key[2].replace("''", "'") + key[3]
        found = _ITEM.fullmatch(item)
        if found is None:
            indent = len(raw) - len(raw.lstrip(" "))
            spaces, role, name, states, ref, rest, text = " " * indent, "text", None, "", None, "", raw.strip(" -")
            if not text:
                continue
        else:
            spaces, role, name, states, ref, rest, text = found.groups()
            if name is not None:
                name = said(name[1:-1] if "\\" not in name else str(json.loads(name, strict=False)))
        if text is not None:
            if len(text) > 1 and text[0] == text[-1] == '"':
                text = _ESCAPE.sub(_unescaped, text[1:-1])
            text = said(text)
        depth = len(spaces) // 2
        del above[depth:]
        parent = above[-1] if above else -1
        above.extend([len(lines)] * (depth + 1 - len(above)))
        lines.append(Line(depth, parent, role, name, states, ref, "[cursor=pointer]" in rest, text))
    return lines


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1]
    if len(code) == 3:
        return chr(int(code[1:], 16))
    return {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}.get(code, code)


@dataclass(frozen=True, slots=True)
class Span:
    """The lines that a root names: from `start` to before `end`; `last` is the line whose subtree ends it, or -1.

    `rest` is how the root of what is left of the span ends, as in `e57..e3`.
    """

    start: int
    end: int
    last: int
    rest: str


class Tree:
    """The lines of one capture, with what is asked of them again and again."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.at = {line.ref: index for index, line in enumerate(lines) if line.ref}
        self.ends = list(range(1, len(lines) + 1))
        """For each line, the index after its subtree."""
        for index in range(len(lines) - 1, -1, -1):
            if (parent := lines[index].parent) >= 0 and self.ends[parent] < self.ends[index]:
                self.ends[parent] = self.ends[index]
        self._acts = [0, *itertools.accumulate(line.acts for line in lines)]

    def acts(self, start: int, end: int) -> int:
        """How many lines from `start` to before `end` can be acted on."""
        return self._acts[end] - self._acts[start]

    def place(self, index: int) -> str:
        """The name of a line's place."""
        back = index
        while back > 0 and self.lines[back].ref is None:
            back -= 1
        ref = self.lines[back].ref or ""
        return ref if ref and back == index else f"{ref}+{index - back}"

    def span(self, root: str | None) -> Span:
        """The lines of a root: a subtree `e12`, all from it on `e12..`, or from it to the end of another, `e12..e3`.

        Raises `InvalidInput` for anything else, or for a ref that the page does not have.
        """
        if root is None:
            return Span(0, len(self.lines), -1, "..")
        found = _ROOT.fullmatch(root)
        first = self._index(found[1], found[2]) if found else None
        if found is None or first is None or (not found[3] and (found[4] or found[5])):
            raise self._unknown(root)
        if not found[3]:
            return Span(first, self.ends[first], first, f"..{self.place(first)}")
        if not found[4] and not found[5]:
            return Span(first, len(self.lines), -1, "..")
        last = self._index(found[4], found[5])
        if last is None:
            raise self._unknown(root)
        return Span(first, max(first + 1, self.ends[last]), last, f"..{self.place(last)}")

    def _index(self, ref: str | None, offset: str | None) -> int | None:
        if ref is None and offset is None:
            return None
        start = 0 if ref is None else self.at.get(ref)
        index = None if start is None else start + int(offset or 0)
        return index if index is not None and index < len(self.lines) else None

    def _unknown(self, root: str) -> InvalidInput:
        return InvalidInput(
            f"The page has no ref {root[:40]!r} now. Take a new snapshot without root and use a ref of it."
        )


@dataclass(frozen=True, slots=True)
class Fold:
    """Siblings that one line stands for: where they begin and end, how many they are and what they hold."""

    start: int
    end: int
    count: int
    role: str
    acts: int
    root: str

    def row(self, depth: int, mark: str = "") -> Row:
        """The line in their place."""
        return Row(self.start, depth, f"- {self.role}", f'{self.count} more like it, root="{self.root}"', self, mark)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an answer: the captured line it begins with, how deep it stands, its text, what changed about it.

    `note` is what the server says of it, which no text of the page may be taken for.
    """

    index: int
    depth: int
    text: str
    note: str = ""
    fold: Fold | None = None
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Outline:
    """A capture without the lines that say nothing: wrappers, addresses, labels that repeat a field's name.

    `kept` are the indices of what stays; `above` gives for every line the nearest kept line that it stands under,
    or -1; `texts` holds texts that stand in the row of the line above them.
    """

    tree: Tree
    kept: list[int]
    above: list[int]
    texts: Mapping[int, str]

    def shown(self, index: int, limit: int = 0) -> str:
        """The row of a kept line, without indentation."""
        return self.tree.lines[index].shown(text=self.texts.get(index), limit=limit)

    def depths(self, chosen: Collection[int]) -> dict[int, int]:
        """How deep each of the kept lines `chosen`, in order, stands under the others."""
        depths: dict[int, int] = {}
        for index in chosen:
            above = self.above[index]
            while above >= 0 and above not in depths:
                above = self.above[above]
            depths[index] = depths[above] + 1 if above >= 0 else 0
        return depths


def condense(tree: Tree, needed: Collection[int] = ()) -> Outline:
    """The outline of a capture, which leaves out nothing that can be acted on, nor the lines that are `needed`."""
    lines = tree.lines
    kept, inner = _worth_a_line(lines, needed)
    texts: dict[int, str] = {}
    for index, line in enumerate(lines):
        if line.role == "text" and kept[index] and index not in needed and (parent := line.parent) >= 0:
            owner = lines[parent]
            if kept[parent] and inner[parent] == 1 and owner.text is None and line.text is not None:
                texts[parent] = line.text
                kept[index] = False
    above = _above(lines, kept)
    wrappers = [index for index, line in enumerate(lines) if kept[index] and _wraps(line) and index not in needed]
    # Many wrappers side by side are the cards or rows of a list, which is what can be folded.
    beside = Counter(above[index] for index in wrappers)
    if dropped := [index for index in wrappers if beside[above[index]] < SHORTEST_RUN]:
        for index in dropped:
            kept[index] = False
        above = _above(lines, kept)
    return Outline(tree, [index for index, keeps in enumerate(kept) if keeps], above, texts)


def _wraps(line: Line) -> bool:
    return line.role in _WRAPPERS and line.text is None and line.name is None and not line.pointer


def _worth_a_line(lines: Sequence[Line], needed: Collection[int]) -> tuple[list[bool], list[int]]:
    """Which lines say something or hold several that do, and how many of these stand directly under each."""
    kept = [True] * len(lines)
    inner = [0] * len(lines)
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        if index not in needed:
            if line.role[0] == "/" or (line.role == "text" and _repeats(lines, index)):
                kept[index] = False
            elif inner[index] < 2:
                single = line.role == "listitem" and inner[index] == 1 and line.text is None and line.name is None
                kept[index] = not (_wraps(line) or (single and not line.pointer))
        if line.parent >= 0:
            inner[line.parent] += 1 if kept[index] else inner[index]
    return kept, inner


def _above(lines: Sequence[Line], kept: Sequence[bool]) -> list[int]:
    above = [-1] * len(lines)
    for index, line in enumerate(lines):
        if (parent := line.parent) >= 0:
            above[index] = parent if kept[parent] else above[parent]
    return above


def _repeats(lines: Sequence[Line], index: int) -> bool:
    """Whether a text is only the visible label of the field beside it, which bears it as its name."""
    text, parent = lines[index].text, lines[index].parent
    for beside in (index + 1, index - 1):
        if 0 <= beside < len(lines):
            other = lines[beside]
            if other.parent == parent and other.role in CONTROLS and other.name is not None and other.name == text:
                return True
    return False


def folds(outline: Outline, chosen: Sequence[int], open_at: int | None = None) -> list[Fold]:
    """The runs of alike siblings among the kept lines `chosen`, without their first few.

    Nothing is folded directly under the line `open_at`, beside it, or directly under what stands beside it: whoever
    asks for a fold sees what is in it.
    """
    lines, above = outline.tree.lines, outline.above
    roles: dict[int, frozenset[str]] = defaultdict(frozenset)
    for index in reversed(chosen):
        if (parent := above[index]) >= 0:
            role = lines[index].role
            roles[parent] |= roles[index] if role in _PLAIN else roles[index] | {role}
    opened = {open_at, above[open_at]} if open_at is not None else set()
    siblings: dict[int, list[int]] = defaultdict(list)
    for index in chosen:
        siblings[above[index]].append(index)
    found = []
    for parent, children in siblings.items():
        if len(children) < SHORTEST_RUN or parent in opened:
            continue
        if open_at is not None and parent >= 0 and above[parent] == above[open_at]:
            continue
        for _, alike in itertools.groupby(children, key=lambda index: (lines[index].role, roles.get(index))):
            run = list(alike)
            if len(run) >= SHORTEST_RUN:
                found.append(_fold(outline, run[SHOWN_OF_RUN:]))
    return _outermost(found)


def _fold(outline: Outline, run: Sequence[int]) -> Fold:
    tree = outline.tree
    start, last = run[0], run[-1]
    end = tree.ends[last]
    root = f"{tree.place(start)}..{tree.place(last)}"
    return Fold(start, end, len(run), tree.lines[start].role, tree.acts(start, end), root)


def _outermost(found: Iterable[Fold]) -> list[Fold]:
    outermost: list[Fold] = []
    for fold in sorted(found, key=lambda fold: (fold.start, -fold.end)):
        if not outermost or fold.start >= outermost[-1].end:
            outermost.append(fold)
    return outermost
