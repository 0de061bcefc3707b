"""Lines of a snapshot: read, named, condensed, folded, compared and fitted without a browser."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_flow.errors import InvalidInput
from mcp_flow.page import compare
from mcp_flow.page.fit import HEADER_CHARS, Fence, Header
from mcp_flow.page.tree import SHOWN_OF_RUN, Line, Outline, Tree, condense, folds, parse

ROLES = ["generic", "list", "listitem", "link", "button", "textbox", "text", "paragraph", "/url", "option", "iframe"]


def shown(outline: Outline) -> list[str]:
    depths = outline.depths(outline.kept)
    return ["  " * depths[index] + outline.shown(index) for index in outline.kept]


def outline(snapshot: str) -> Outline:
    return condense(Tree(parse(snapshot)))


@st.composite
def trees(draw: st.DrawFn) -> list[Line]:
    """Lines of any shape, with runs, where most have refs."""
    lines: list[Line] = []
    path: list[int] = []
    for number in range(draw(st.integers(1, 60))):
        depth = draw(st.integers(0, len(path)))
        del path[depth:]
        role = draw(st.sampled_from(ROLES))
        has_ref = role not in ("text", "/url", "option") and draw(st.integers(0, 9)) > 0
        name = draw(st.sampled_from([None, "a", "b"])) if role not in ("text", "/url") else None
        text = draw(st.sampled_from([None, "x"])) if role not in ("text", "/url") else "x"
        ref, pointer = (f"e{number}", draw(st.integers(0, 5)) == 0) if has_ref else (None, False)
        lines.append(Line(depth, path[-1] if path else -1, role, name, "", ref, pointer, text))
        path.append(number)
    return lines


def test_lines_keep_one_form_however_the_snapshot_quotes_them() -> None:
    lines = parse(
        "- 'button \"a: \\\"b\\\" # {c} it''s\" [disabled] [ref=e1] [cursor=pointer]': x\n"
        '- textbox "t" [ref=f1e2]: "quoted: \\x1b\\n\\"y\\""\n'
        "  - /placeholder: p\n"
        "- text: plain"
    )
    assert [line.shown() for line in lines] == [
        '- button "a: \\"b\\" # {c} it\'s" [disabled] [ref=e1]: x',
        '- textbox "t" [ref=f1e2]: quoted: \x1b\n"y"',
        "- /placeholder: p",
        "- text: plain",
    ]
    assert [line.ref for line in lines] == ["e1", "f1e2", None, None]
    assert [line.parent for line in lines] == [-1, -1, 1, -1]


def test_an_outline_drops_wrappers_addresses_and_labels_that_repeat_a_name() -> None:
    snapshot = """\
- generic [ref=e1]:
  - generic [ref=e2]:
    - text: Name
    - textbox "Name" [ref=e3]:
      - /placeholder: p
      - text: Bob
  - list [ref=e4]:
    - listitem [ref=e5]:
      - link "One" [ref=e6] [cursor=pointer]:
        - /url: /one
    - listitem [ref=e7]: two
  - generic [ref=e8] [cursor=pointer]: click"""
    assert shown(outline(snapshot)) == [
        '- textbox "Name" [ref=e3]: Bob',
        "- list [ref=e4]",
        '  - link "One" [ref=e6]',
        "  - listitem [ref=e7]: two",
        "- generic [ref=e8] [cursor=pointer]: click",
    ]


@given(trees())
def test_an_outline_keeps_all_that_can_be_acted_on_and_all_texts(lines: list[Line]) -> None:
    kept = condense(Tree(lines))
    for index, line in enumerate(lines):
        if line.acts:
            assert index in kept.kept
    written = "\n".join(shown(kept))
    assert written.count(": x") >= sum(line.text == "x" and line.role not in ("text", "/url") for line in lines)


def test_cards_of_plain_wrappers_are_folded_as_one_run() -> None:
    cards = "\n".join(
        f"- generic [ref=e{n}]:\n  - heading [ref=e{n + 1}]: h\n  - button [ref=e{n + 2}]" for n in range(0, 60, 3)
    )
    kept = outline(cards)
    [fold] = folds(kept, kept.kept)
    assert (fold.count, fold.role, fold.acts) == (20 - SHOWN_OF_RUN, "generic", 20 - SHOWN_OF_RUN)
    assert fold.root == "e12..e57"
    assert folds(kept, kept.kept, kept.tree.span(fold.root).last) == []


def test_places_without_a_ref_are_named_from_the_ref_before_them() -> None:
    tree = Tree(parse("- text: a\n- combobox [ref=e1]:\n  - option: b\n  - option: c\n- button [ref=e2]"))
    assert [tree.place(index) for index in range(5)] == ["+0", "e1", "e1+1", "e1+2", "e2"]
    for index in range(5):
        span = tree.span(tree.place(index) + "..")
        assert (span.start, span.end) == (index, 5)
    assert (tree.span("e1").start, tree.span("e1").end) == (1, 4)
    assert (tree.span("e1+1..e1+2").start, tree.span("e1+1..e1+2").end) == (2, 4)
    assert (tree.span("e1+2..e1").start, tree.span("e1+2..e1").end) == (3, 4)


@pytest.mark.parametrize("root", ["e9", "body", "", "..", "e1..e9", "e1e2", "+9", "e1+99", "e1..x", "\u202ee1"])
def test_a_root_that_the_page_does_not_have_is_refused(root: str) -> None:
    with pytest.raises(InvalidInput, match="Take a new snapshot"):
        Tree(parse("- button [ref=e1]")).span(root)


@given(trees(), trees(), st.randoms())
def test_a_difference_tells_every_line_that_is_not_the_same_one(
    before: list[Line], after: list[Line], chance: random.Random
) -> None:
    old, new = condense(Tree(before)), condense(Tree(after))
    assert not compare.compare(old, old)
    difference = compare.compare(old, new)
    told = [f"{row.text} {row.note}" for row in compare.rows(new, difference, 0)]
    known = {before[index].ref for index in old.kept}
    for index in new.kept:
        ref = after[index].ref
        if ref and ref not in known and not any(" more like it" in text for text in told):
            assert any(f"[ref={ref}]" in text for text in told)
    gone = known - {after[index].ref for index in new.kept}
    assert not any(f"[ref={ref}]" in text for ref in gone for text in told), "what is gone can't be used"


def test_a_reordered_list_names_only_what_moved() -> None:
    def listing(order: list[int]) -> Outline:
        return outline("\n".join(f'- button "{n}" [ref=e{n}]' for n in order))

    difference = compare.compare(listing([1, 2, 3, 4, 5]), listing([2, 3, 4, 1, 5]))
    assert [row.text for row in compare.rows(listing([2, 3, 4, 1, 5]), difference, 0)] == ['- button "1" [ref=e1]']


def test_a_change_of_an_address_is_a_change_and_where_the_focus_is_is_none() -> None:
    before = outline("- link [ref=e1]:\n  - /url: /a\n- button [ref=e2]")
    assert compare.compare(before, outline("- link [ref=e1]:\n  - /url: /b\n- button [ref=e2]")).changed == {0}
    assert not compare.compare(before, outline("- link [ref=e1]:\n  - /url: /a\n- button [active] [ref=e2]"))


def test_thousands_of_lines_in_another_order_are_compared_at_once() -> None:
    numbers = list(range(5000))
    before = outline("\n".join(f"- text: {n % 7}\n- button [ref=e{n}]" for n in numbers))
    random.Random(1).shuffle(numbers)
    after = outline("\n".join(f"- text: {n % 7}\n- button [ref=e{n}]" for n in numbers))
    began = time.process_time()
    assert compare.compare(before, after).share > 0.6
    assert time.process_time() - began < 1


@given(
    st.lists(st.text(max_size=300), min_size=1, max_size=4),
    st.text(max_size=300),
    st.text(max_size=300),
    st.text(max_size=300),
    st.lists(st.text(max_size=300), max_size=3),
    st.integers(500, 9000),
)
def test_a_header_is_short_whatever_it_says(
    facts: list[str], place: str, about: str, title: str, news: list[str], max_chars: int
) -> None:
    lines = Header(facts, place, about, title, news).lines(Fence("0" * 12), max_chars)
    assert len("\n".join(lines)) <= min(HEADER_CHARS, max_chars // 2)
    marker = next(number for number, line in enumerate(lines) if line.startswith("<<page text 000000000000"))
    assert re.match(r"title: |…", lines[marker + 1])
