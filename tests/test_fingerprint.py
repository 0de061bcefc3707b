"""Equal data has one fingerprint in every process; what is no data counts as its type and is never touched."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, SecretStr

from mcp_flow import fingerprint


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Mood(enum.StrEnum):
    FINE = "fine"


class Item(BaseModel):
    name: str
    count: int = 1

    @functools.cached_property
    def shout(self) -> str:
        return self.name.upper()


class Other(BaseModel):
    name: str
    count: int = 1


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


@dataclasses.dataclass
class Point:
    x: int
    y: Any = 0


@dataclasses.dataclass
class Node:
    name: str
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)


class Handle:
    def __init__(self, number: int) -> None:
        self.number = number

    def open(self, url: str) -> None: ...


def numbers() -> Iterator[int]:
    yield from (1, 2, 3)


def looked_at() -> Item:
    item = Item(name="a")
    assert item.shout == "A"
    return item


UTC_NOON = datetime(2031, 1, 1, 12, tzinfo=UTC)
SAME_ID = UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        ({1, 2, 3}, frozenset([3, 2, 1])),
        (b"xy", bytearray(b"xy")),
        (0.1 + 0.2, 0.30000000000000004),
        (float("nan"), float("nan")),
        (Colour.RED, Colour.RED),
        (UTC_NOON, datetime(2031, 1, 1, 12, tzinfo=UTC)),
        (Decimal("1.50"), Decimal("1.50")),
        (SAME_ID, UUID(str(SAME_ID))),
        (Path("/a/b"), Path("/a") / "b"),
        (Item(name="a"), Item(name="a", count=1)),
        (Item(name="a"), looked_at()),
        (Point(1, [2]), Point(1, [2])),
        (SecretStr("one"), SecretStr("two")),
        (Handle(1), Handle(2)),
        (numbers(), numbers()),
        (len, sorted),
    ],
)
def test_these_two_are_the_same_arguments(one: Any, other: Any) -> None:
    assert fingerprint.of(one) == fingerprint.of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (0, None),
        (None, "null"),
        (1, 1.0),
        (1, "1"),
        (1.5, "1.5"),
        ("", []),
        ([], {}),
        ([], set()),
        ([1, 2], [2, 1]),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"a": 2}),
        ({"1": 1}, {1: 1}),
        ({"a": 1}, [["a", 1]]),
        ({1, 2}, [1, 2]),
        ({1, 2}, {1, 3}),
        (b"6162", "6162"),
        (b"ab", "6162"),
        (["float", "1.5"], 1.5),
        (Colour.RED, Colour.BLUE),
        (Colour.RED, "RED"),
        (Mood.FINE, "FINE"),
        (UTC_NOON, UTC_NOON + timedelta(microseconds=1)),
        (date(2031, 1, 1), "2031-01-01"),
        (Decimal("1.5"), Decimal("1.50")),
        (Path("/a"), "/a"),
        (SAME_ID, str(SAME_ID)),
        (Item(name="a"), Item(name="b")),
        (Item(name="a"), Other(name="a")),
        (Item(name="a"), {"name": "a", "count": 1}),
        (Loose(a=1), Loose(a=2)),  # type: ignore[call-arg]
        (Point(1, [2]), Point(1, [3])),
        (Handle(1), numbers()),
        (SecretStr("one"), "one"),
    ],
)
def test_these_two_are_different_arguments(one: Any, other: Any) -> None:
    assert fingerprint.of(one) != fingerprint.of(other)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def exact(value: Any) -> Any:
    """`value` so that `==` tells apart what Python counts as equal: 1 and 1.0 and True, 0.0 and -0.0."""
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return type(value).__name__, repr(value)


@given(json_values, json_values)
def test_json_values_have_one_fingerprint_exactly_when_they_are_the_same(one: Any, other: Any) -> None:
    assert (fingerprint.of(one) == fingerprint.of(other)) is (exact(one) == exact(other))


def test_a_fingerprint_does_not_depend_on_the_seed_of_hashing() -> None:
    code = (
        "from mcp_flow import fingerprint\n"
        "words = {f'word{i}' for i in range(50)}\n"
        "print([*words][:3])\n"
        "print(fingerprint.of([words, {w: {w, w + '!'} for w in words}, {frozenset('abc'), frozenset('def')}]))"
    )
    orders, prints = set(), set()
    for seed in ("0", "1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(fingerprint.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        order, text = done.stdout.splitlines()
        orders.add(order)
        prints.add(text)
    assert len(orders) > 1
    assert len(prints) == 1


def test_an_iterator_is_not_consumed() -> None:
    generator, mapped, opened = numbers(), map(str, [1, 2]), iter([7])
    fingerprint.of([generator, {"m": mapped}, Point(1, opened)])
    assert [*generator] == [1, 2, 3]
    assert [*mapped] == ["1", "2"]
    assert [*opened] == [7]


def test_what_holds_itself_has_a_fingerprint() -> None:
    ring: list[Any] = [1]
    ring.extend([ring, ring, {"again": ring}])
    assert fingerprint.of(ring) == fingerprint.of(ring)


def test_a_tree_whose_children_know_their_parent_has_a_fingerprint_of_its_data() -> None:
    def tree(last: str) -> Node:
        root = Node("root")
        for i in range(20):
            child = Node(str(i), parent=root)
            child.children = [Node(f"{i}.{j}", parent=child) for j in range(5)]
            root.children.append(child)
        root.children[-1].children[-1].name = last
        return root

    assert fingerprint.of(tree("a")) == fingerprint.of(tree("a"))
    assert fingerprint.of(tree("a")) != fingerprint.of(tree("b"))


def test_a_value_nested_beyond_any_use_has_a_fingerprint() -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    assert fingerprint.of(deep) == fingerprint.of([deep])


def test_sharing_one_object_is_the_same_as_having_two_equal_ones() -> None:
    shared = Point(1)
    assert fingerprint.of([shared, shared]) == fingerprint.of([Point(1), Point(1)])


def make(captured: Any) -> Callable[[], Any]:
    return lambda: captured


def make_with_default(default: Any) -> Callable[..., Any]:
    def local(value: Any = default, *, extra: Any = default) -> Any:
        return value, extra

    return local


def top(value: int = 5) -> int:
    return value


def test_a_call_counts_its_arguments() -> None:
    assert fingerprint.of_call(top, (1,)) == fingerprint.of_call(top, (1,))
    assert fingerprint.of_call(top, (1,)) != fingerprint.of_call(top, (2,))
    assert fingerprint.of_call(top, ()) != fingerprint.of_call(top, (None,))


def test_a_call_counts_what_partials_bind_at_every_level() -> None:
    inner = functools.partial(top, 1)
    assert fingerprint.of_call(functools.partial(inner, value=2), ()) == fingerprint.of_call(
        functools.partial(functools.partial(top, 1), value=2), ()
    )
    assert fingerprint.of_call(inner, ()) != fingerprint.of_call(functools.partial(top, 2), ())
    assert fingerprint.of_call(functools.partial(top, value=1), ()) != fingerprint.of_call(inner, ())


def test_a_call_counts_closure_cells() -> None:
    assert fingerprint.of_call(make([1]), ()) == fingerprint.of_call(make([1]), ())
    assert fingerprint.of_call(make([1]), ()) != fingerprint.of_call(make([2]), ())


def test_a_call_counts_the_defaults_of_lambdas_and_local_functions_only() -> None:
    assert fingerprint.of_call(make_with_default(1), ()) == fingerprint.of_call(make_with_default(1), ())
    assert fingerprint.of_call(make_with_default(1), ()) != fingerprint.of_call(make_with_default(2), ())
    assert fingerprint.of_call(lambda x=1: x, ()) != fingerprint.of_call(lambda x=2: x, ())
    before = fingerprint.of_call(top, ())
    saved, top.__defaults__ = top.__defaults__, (6,)
    try:
        assert fingerprint.of_call(top, ()) == before
    finally:
        top.__defaults__ = saved


def test_a_bound_method_counts_its_arguments_and_not_its_self() -> None:
    assert fingerprint.of_call(Handle(1).open, ("/a",)) == fingerprint.of_call(Handle(2).open, ("/a",))
    assert fingerprint.of_call(Handle(1).open, ("/a",)) != fingerprint.of_call(Handle(1).open, ("/b",))


def test_a_closure_over_a_name_that_is_not_bound_yet_has_a_fingerprint() -> None:
    def read() -> int:
        return late

    before = fingerprint.of_call(read, ())
    late = 3
    assert fingerprint.of_call(read, ()) != before


def plain(*args: object) -> None: ...


@pytest.mark.parametrize("args", [(), (1,), ("a", None, True), (1, "é")])
def test_a_call_with_plain_values_has_the_fingerprint_of_its_canonical_form(args: tuple[Any, ...]) -> None:
    assert fingerprint.of_call(plain, args) == fingerprint.of([args])


def code_of(source: str) -> str:
    """The hash of the function `f` that some source defines."""
    names: dict[str, Any] = {"functools": functools}
    exec(compile(source, "flow.py", "exec"), names)
    return fingerprint.of_code(names["f"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(): return 1", "\n\ndef f():\n    # a remark\n    return 1"),
        ("f = lambda: [n + 1 for n in (1, 2)]", "x = 5\nf = lambda: [\n    n + 1\n    for n in (1, 2)\n]"),
        ("def f(): return 1", "def g(): return 1\nf = functools.partial(functools.partial(g))"),
        (
            "def f(a):\n    def g():\n        return a\n    return g",
            "def f(a):\n\n    def g():\n\n        return a\n\n    return g",
        ),
    ],
    ids=["lines and remarks", "lines of a lambda", "partials", "lines of a function within"],
)
def test_code_that_only_stands_elsewhere_is_the_same(one: str, other: str) -> None:
    assert code_of(one) == code_of(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("f = lambda: 1", "f = lambda: 2"),
        ("f = lambda: 1", "f = lambda: 1.0"),
        ("f = lambda: 1", "f = lambda: True"),
        ("f = lambda: 'a'", "f = lambda: b'a'"),
        ("f = lambda: (lambda: 1)", "f = lambda: (lambda: 2)"),
        ("f = lambda x: x in {1, 2}", "f = lambda x: x in {1, 3}"),
        ("f = lambda x: x in (1, 2)", "f = lambda x: x in (2, 1)"),
        ("f = lambda x: x.save()", "f = lambda x: x.load()"),
        ("f = lambda x, y: x - y", "f = lambda x, y: y - x"),
        ("def f(): return 1", "async def f(): return 1"),
    ],
)
def test_code_that_does_something_else_is_another(one: str, other: str) -> None:
    assert code_of(one) != code_of(other)


def test_what_is_not_the_authors_code_has_none() -> None:
    others: list[Callable[..., Any]] = [print, str, list[int]().append, functools.partial(len)]
    assert [fingerprint.of_code(fn) for fn in others] == [""] * 4


def test_the_hash_of_code_does_not_depend_on_the_seed_of_hashing() -> None:
    source = "from mcp_flow import fingerprint\nprint(fingerprint.of_code(lambda x: x in {'a', 'b', 'c', 'd'}))"
    path = {"PYTHONPATH": str(Path(fingerprint.__file__).parents[1])}
    hashes = {
        subprocess.run(
            [sys.executable, "-c", source],
            env=os.environ | {"PYTHONHASHSEED": seed, **path},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(hashes) == 1
