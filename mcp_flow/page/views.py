"""The forms in which a capture is shown: as an outline, only its controls, all of it, its text. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

from mcp_flow.page.tree import Line, Outline, Row, Span, Tree, condense, folds, shortened

Form = Literal["outline", "interactive", "full", "text"]

OUTLINED = 160
"""How much of a name or a text an outline shows."""
LONGEST_INNER = 80
"""How much of what stands inside a control without a name tells what it is."""
_HOLDERS = frozenset({"combobox", "listbox", "textbox", "searchbox", "spinbutton"})
"""What shows a value inside it, beside its name."""
_INLINE = frozenset(
    ["text", "link", "strong", "emphasis", "code", "superscript", "subscript", "mark", "time", "insertion", "deletion"]
)


def rows(tree: Tree, form: Form, span: Span, matched: Collection[int] | None, limit: int) -> list[Row]:
    """What a form shows of the lines of `span`, or of those among them that have `matched`; `limit` shortens texts."""
    chosen = range(span.start, span.end)
    if form == "interactive":
        return list(_interactive(tree, chosen, matched, limit))
    if form == "text":
        return list(_text(tree, chosen, matched, limit))
    if form == "full":
        return _full(tree, chosen, matched, limit)
    return _outline(tree, span, matched, min(limit, OUTLINED) if matched is None else limit)


def _outline(tree: Tree, span: Span, matched: Collection[int] | None, limit: int) -> list[Row]:
    needed = {index for index in (span.last,) if index >= 0} | set(matched or ())
    outline = condense(tree, needed)
    kept = [index for index in outline.kept if span.start <= index < span.end]
    if matched is None:
        return _folded(outline, kept, span, limit)
    chosen = _with_ancestors((index for index in kept if index in matched), outline.above, span.start)
    return [Row(index, depth, outline.shown(index, limit)) for index, depth in outline.depths(chosen).items()]


def _folded(outline: Outline, kept: Sequence[int], span: Span, limit: int) -> list[Row]:
    found = {fold.start: fold for fold in folds(outline, kept, span.last if span.last >= 0 else None)}
    shown = []
    skipped = 0
    for index, depth in outline.depths(kept).items():
        if index < skipped:
            continue
        fold = found.get(index)
        if fold:
            skipped = fold.end
        shown.append(fold.row(depth) if fold else Row(index, depth, outline.shown(index, limit)))
    return shown


def _full(tree: Tree, chosen: range, matched: Collection[int] | None, limit: int) -> list[Row]:
    lines = tree.lines
    indices: Sequence[int] = chosen
    if matched is not None:
        parents = [line.parent for line in lines]
        indices = _with_ancestors((index for index in chosen if index in matched), parents, chosen.start)
    return [Row(index, lines[index].depth, lines[index].shown(limit=limit, flat=False)) for index in indices]


def _with_ancestors(indices: Iterable[int], above: Sequence[int], start: int) -> list[int]:
    """The lines and those from `start` on under which they stand, in order."""
    found: set[int] = set()
    for index in indices:
        while index >= start and index not in found:
            found.add(index)
            index = above[index]
    return sorted(found)


def _interactive(tree: Tree, chosen: range, matched: Collection[int] | None, limit: int) -> Iterator[Row]:
    lines = tree.lines
    for index in chosen:
        line = lines[index]
        inside = range(index, tree.ends[index])
        if not line.acts or (matched is not None and not any(within in matched for within in inside)):
            continue
        text, note = line.text, ""
        if text is None and (line.name is None or line.role in _HOLDERS):
            text, note = _inner(tree, index)
        yield Row(index, 0, line.shown(text=text, limit=limit, flat=True), note)


def _inner(tree: Tree, index: int) -> tuple[str | None, str]:
    """What stands in a control: the chosen options, with a note of how many there are, or its first texts."""
    inside = [tree.lines[within] for within in range(index + 1, tree.ends[index])]
    options = [line for line in inside if line.role == "option" and line.ref is None]
    if options:
        chosen = [line.name or line.text or "" for line in options if "[selected]" in line.states]
        few = len(chosen) < 4
        names = shortened(", ".join(chosen), LONGEST_INNER) if few else ""
        return names or None, f"{len(options)} options" + ("" if few else f", {len(chosen)} chosen")
    said: list[str] = []
    for line in inside:
        if line.acts:
            break
        if line.role[0] != "/" and (text := line.text or line.name):
            said.append(text)
            if sum(map(len, said)) > LONGEST_INNER:
                break
    return shortened(" ".join(said), LONGEST_INNER) or None, ""


def _text(tree: Tree, chosen: range, matched: Collection[int] | None, limit: int) -> Iterator[Row]:
    """What can be read: one row for each block, its inline parts joined."""
    lines = tree.lines
    parts: list[str] = []
    last: Line | None = None
    first, found = chosen.start, False
    for index in chosen:
        line = lines[index]
        said = None if line.role[0] == "/" or _unchosen(line) else line.text or _own_name(tree, index)
        if not said:
            continue
        if last is None or not _joins(last, line):
            if parts and found:
                yield Row(first, 0, shortened(" ".join(parts), limit))
            parts, first, found = [], index, False
        parts.append(said)
        last = line
        found = found or matched is None or index in matched
    if parts and found:
        yield Row(first, 0, shortened(" ".join(parts), limit))


def _unchosen(line: Line) -> bool:
    """Whether it is an option of a closed list, which nobody sees."""
    return line.role == "option" and line.ref is None and "[selected]" not in line.states


def _joins(before: Line, after: Line) -> bool:
    """Whether two lines are parts of one sentence: inline both, and one of them is bare text."""
    roles = {before.role, after.role}
    return before.parent == after.parent and roles <= _INLINE and "text" in roles


def _own_name(tree: Tree, index: int) -> str | None:
    """The name of a line, unless the lines under it say it."""
    inside = tree.lines[index + 1 : tree.ends[index]]
    if tree.lines[index].role != "heading" and any(line.text for line in inside if line.role[0] != "/"):
        return None
    return tree.lines[index].name
