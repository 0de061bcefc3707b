"""What is different between two captures of a page. Pure."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from mcp_flow.page.tree import Outline, Row, folds

SHOWN_REMOVED = 5
"""So many lines that are gone are shown in one place; nobody can act on them any more."""


@dataclass(frozen=True, slots=True)
class Removed:
    """A line that is gone with all that stood under it, and the kept line above it in the later capture, or -1."""

    under: int
    text: str
    lines: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What the later of two captures has more, has otherwise or elsewhere, and has no more.

    `share` is the part of the page that this is, from 0 to 1 or a little more.
    """

    added: frozenset[int]
    changed: frozenset[int]
    removed: tuple[Removed, ...]
    share: float

    def only(self, fits: Callable[[int], bool], removed: Sequence[Removed]) -> Difference:
        """The part of it whose lines fit, and of what is gone only `removed`."""
        return Difference(
            frozenset(filter(fits, self.added)), frozenset(filter(fits, self.changed)), tuple(removed), self.share
        )

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        gone = sum(removed.lines for removed in self.removed)
        counts = {"+": len(self.added), "~": len(self.changed), "-": gone}
        return " ".join(f"{mark}{count}" for mark, count in counts.items() if count) or "nothing"


def compare(before: Outline, now: Outline) -> Difference:
    """The difference between two captures, line by line: a line is the same one as long as its ref is."""
    old, new = _keyed(before), _keyed(now)
    added = frozenset(index for key, (index, _) in new.items() if key not in old)
    common = [key for key in new if key in old]
    changed = {new[key][0] for key in common if new[key][1] != old[key][1]}
    changed |= _moved([(old[key][0], new[key][0]) for key in common])
    removed = _removed(before, {index: key for key, (index, _) in old.items()}, new)
    gone = sum(part.lines for part in removed)
    share = (len(added) + len(changed) + gone) / max(1, len(before.kept), len(now.kept))
    return Difference(added, frozenset(changed), tuple(removed), share)


def _keyed(outline: Outline) -> dict[Hashable, tuple[int, Hashable]]:
    """The kept lines by what they are known by, each with its index and everything that may change about it."""
    lines = outline.tree.lines
    extra: dict[int, tuple[str | None, ...]] = defaultdict(tuple)
    for line in lines:
        if line.role[0] == "/":
            extra[line.parent] += (line.text,)
    keyed: dict[Hashable, tuple[int, Hashable]] = {}
    alike: Counter[Hashable] = Counter()
    for index in outline.kept:
        line = lines[index]
        key: Hashable = line.ref
        if line.ref is None:
            above = line.parent
            while above >= 0 and lines[above].ref is None:
                above = lines[above].parent
            key = (lines[above].ref if above >= 0 else None, line.role, line.name, line.text)
            alike[key] += 1
            key = (key, alike[key])
        states = line.states.replace(" [active]", "")  # where the focus is, is no change of the page
        text = outline.texts.get(index, line.text)
        keyed[key] = (index, (line.role, line.name, states, line.pointer, text, extra.get(index)))
    return keyed


def _moved(places: Sequence[tuple[int, int]]) -> set[int]:
    """The later places of what does not stand in the longest part that has kept its order."""
    ends: list[int] = []
    """For each length, the smallest earlier place that ends a part of that length, in `places` as `tails`."""
    tails: list[int] = []
    before: list[int] = []
    for number, (old, _) in enumerate(places):
        length = bisect.bisect_left(ends, old)
        before.append(tails[length - 1] if length else -1)
        ends[length : length + 1] = [old]
        tails[length : length + 1] = [number]
    kept = set()
    number = tails[-1] if tails else -1
    while number >= 0:
        kept.add(number)
        number = before[number]
    return {new for number, (_, new) in enumerate(places) if number not in kept}


def _removed(before: Outline, keys: dict[int, Hashable], new: dict[Hashable, tuple[int, Hashable]]) -> list[Removed]:
    lines = before.tree.lines
    counts: dict[int, int] = {}
    places: dict[int, int] = {}
    for index in before.kept:
        if keys[index] in new:
            continue
        above = before.above[index]
        top = index
        while above >= 0 and keys[above] not in new:
            top, above = above, before.above[above]
        counts[top] = counts.get(top, 0) + 1
        places[top] = new[keys[above]][0] if above >= 0 else -1
    return [
        Removed(
            places[top],
            lines[top]._replace(ref=None, pointer=False).shown(text=before.texts.get(top)),
            counts[top],
        )
        for top in sorted(counts)
    ]


def rows(now: Outline, difference: Difference, limit: int) -> list[Row]:
    """The difference as lines marked `+`, `~` and `-`, each part under the line that it stands under."""
    chosen = difference.added | difference.changed
    gone: dict[int, list[Removed]] = defaultdict(list)
    for part in difference.removed:
        gone[part.under].append(part)
    context = {now.above[index] for index in chosen} | set(gone)
    depths = now.depths(sorted((chosen | context) - {-1}))
    folded = {fold.start: fold for fold in folds(now, sorted(difference.added))}
    shown = _gone(gone[-1], 0, 0)
    skipped = 0
    for index, depth in depths.items():
        if index < skipped and index in difference.added:
            continue
        mark = "+" if index in difference.added else "~" if index in difference.changed else " "
        if fold := folded.get(index):
            skipped = fold.end
            shown.append(fold.row(depth, mark))
            continue
        shown.append(Row(index, depth, now.shown(index, limit), mark=mark))
        shown.extend(_gone(gone.get(index, []), index, depth + 1))
    return shown


def _gone(parts: Sequence[Removed], index: int, depth: int) -> list[Row]:
    shown = [
        Row(index, depth, part.text, f"with {part.lines - 1} lines under it" if part.lines > 1 else "", mark="-")
        for part in parts[:SHOWN_REMOVED]
    ]
    if more := sum(part.lines for part in parts[SHOWN_REMOVED:]):
        shown.append(Row(index, depth, "-", f"{more} lines more", mark="-"))
    return shown
