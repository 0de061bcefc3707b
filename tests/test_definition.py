from __future__ import annotations

import enum
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from mcp_flow.definition import MISSING, annotation_of, codec, workflow
from mcp_flow.errors import BrokenWorkflow, InvalidInput

if TYPE_CHECKING:
    from nowhere import Page  # type: ignore[import-not-found]


class Item(BaseModel):
    name: str
    price: Decimal = Decimal("1.50")


class Order(BaseModel):
    items: list[Item]
    due: date | None = None


class Aliased(BaseModel):
    model_config = ConfigDict(strict=True)
    number: int = Field(validation_alias="No", serialization_alias="NO")
    day: date


@dataclass
class Point:
    x: int
    y: int


class Row(TypedDict):
    id: int
    note: NotRequired[str]


class Color(enum.Enum):
    RED = "red"


@workflow
async def buy(flow: Any, order: Order) -> Order:
    """Buys what is in the order.

    And pays.
    """
    return order


@workflow(name="look-up")
async def look_up(
    flow: Any,
    json: int,
    copy: Annotated[str, Field(min_length=2)] = "ab",
    *,
    tags: list[str] = [],  # noqa: B006
    any=None,
) -> list[Item]:
    return []


def problems_of(call: Any, *args: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidInput) as caught:
        call(*args)
    return caught.value.problems


# --- a workflow ---


def test_a_workflow_is_named_by_its_function_and_described_by_its_docstring() -> None:
    assert (buy.name, buy.description) == ("buy", "Buys what is in the order.\n\nAnd pays.")
    assert look_up.name == "look-up"
    with open(buy.file) as file:
        assert file.readlines()[buy.line - 1] == "@workflow\n"


async def test_a_workflow_can_be_called_like_its_function() -> None:
    order = Order(items=[])
    assert await buy(None, order) is order


def test_what_cannot_be_a_workflow_is_refused_when_it_is_defined() -> None:
    def plain(flow: Any) -> None: ...
    async def no_flow() -> None: ...
    async def only_keyword(*, flow: Any) -> None: ...
    async def many(flow: Any, *items: int) -> None: ...
    async def open_ended(flow: Any, **fields: int) -> None: ...

    for fn, reason in [
        (plain, "async def plain"),
        (no_flow, "Flow as its first parameter"),
        (only_keyword, "Flow as its first parameter"),
        (many, r"\*items"),
        (open_ended, r"\*\*fields"),
    ]:
        with pytest.raises(TypeError, match=reason):
            workflow(fn)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"'\.\./x' can't be"):
        workflow(name="../x")(buy.fn)


# --- input ---


def test_one_model_is_the_input_and_several_parameters_are_fields() -> None:
    assert buy.input_schema["properties"].keys() == {"items", "due"}
    assert buy.input_schema["required"] == ["items"]
    assert look_up.input_schema["properties"].keys() == {"json", "copy", "tags", "any"}
    assert look_up.input_schema["required"] == ["json"]
    assert buy.input_schema["additionalProperties"] is look_up.input_schema["additionalProperties"] is False


def test_input_becomes_its_normal_form_and_typed_arguments() -> None:
    normal = buy.validate_input({"items": [{"name": "tea"}], "due": "2031-05-01"})
    assert normal == {"items": [{"name": "tea", "price": "1.50"}], "due": "2031-05-01"}
    assert buy.validate_input(normal) == normal
    assert buy.arguments(normal) == {"order": Order(items=[Item(name="tea")], due=date(2031, 5, 1))}
    assert look_up.arguments({"json": 1}) == {"json": 1, "copy": "ab", "tags": [], "any": None}


def test_no_input_is_an_empty_object() -> None:
    @workflow
    async def idle(flow: Any) -> None: ...

    assert idle.validate_input(None) == idle.validate_input({}) == idle.arguments({}) == {}
    assert problems_of(buy.validate_input, None) == ("items: Field required",)


def test_every_bad_field_is_named() -> None:
    problems = problems_of(look_up.validate_input, {"json": "x", "copy": "a", "tags": ["a", 3], "colour": 1})
    assert [problem.partition(":")[0] for problem in problems] == ["json", "copy", "tags[1]", "colour"]
    assert "valid integer" in problems[0]
    assert "(got 'x')" in problems[0]
    assert "the fields are json, copy, tags, any" in problems[3]


def test_a_model_that_ignores_unknown_fields_refuses_them_as_input() -> None:
    assert problems_of(buy.validate_input, {"items": [], "total": 1}) == (
        "total: there is no such field; the fields are items, due",
    )


@pytest.mark.parametrize("value", [[], "x", 3, True])
def test_input_that_is_no_object_is_refused(value: Any) -> None:
    assert "should be a JSON object" in problems_of(buy.validate_input, value)[0]


@pytest.mark.parametrize("value", [float("nan"), object(), "\ud800"])
def test_input_that_is_not_json_is_refused(value: Any) -> None:
    assert "not JSON" in problems_of(look_up.validate_input, {"json": 1, "any": value})[0]


def test_a_normal_form_that_would_lose_something_gives_way_to_what_was_given() -> None:
    @workflow
    async def sign_in(flow: Any, password: SecretStr, user: Aliased) -> None: ...

    given = {"password": "hush", "user": {"No": 1, "day": "2031-05-01"}}
    assert sign_in.validate_input(given) == given
    assert sign_in.arguments(given)["password"].get_secret_value() == "hush"


def test_a_default_model_is_used_when_nothing_is_given() -> None:
    @workflow
    async def again(flow: Any, item: Item = Item(name="tea")) -> None: ...  # noqa: B008

    assert again.validate_input(None) == {"name": "tea", "price": "1.50"}
    assert again.arguments({}) == {"item": Item(name="tea")}


def test_a_field_as_a_parameters_default_gives_its_limits() -> None:
    @workflow
    async def count(flow: Any, times: int = Field(3, ge=1)) -> None: ...

    assert count.validate_input({}) == {"times": 3}
    assert problems_of(count.validate_input, {"times": 0})[0].startswith("times: ")


def test_types_of_a_local_workflow_are_found_where_it_is_defined() -> None:
    class Local(BaseModel):
        size: int

    @workflow
    async def local(flow: Any, local: Local) -> Local:
        return local

    assert local.arguments({"size": 1}) == {"local": Local(size=1)}


def test_an_annotation_that_cannot_be_resolved_is_named_with_its_line() -> None:
    @workflow
    async def lost(flow: Page, thing: Nothing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(BrokenWorkflow, match=rf":{lost.line}: workflow 'lost': .*'thing'.*'Nothing' is not defined"):
        lost.validate_input({})


# --- output ---


def test_output_is_dumped_by_its_annotation() -> None:
    assert buy.dump_output(Order(items=[Item(name="tea")])) == {
        "items": [{"name": "tea", "price": "1.50"}],
        "due": None,
    }
    assert buy.output_schema is not None
    assert buy.output_schema["properties"].keys() == {"items", "due"}


@pytest.mark.parametrize(
    "value", ["ok", {"items": []}, None, Order.model_construct(items="none"), Item(name="tea"), [Order(items=[])]]
)
def test_output_of_the_wrong_type_says_what_was_expected_and_what_came(value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"(?s)returned .*\({type(value).__name__}\).*says Order"):
        buy.dump_output(value)


def test_output_is_not_coerced() -> None:
    @workflow
    async def number(flow: Any) -> int:
        return 1

    @workflow
    async def nothing(flow: Any) -> None: ...

    assert number.dump_output(3) == 3
    for value in ("3", 3.0, True, None):
        with pytest.raises(InvalidInput):
            number.dump_output(value)
    assert nothing.dump_output(None) is None
    with pytest.raises(InvalidInput):
        nothing.dump_output("something")


def test_output_without_annotation_is_plain_json() -> None:
    @workflow
    async def free(flow):
        return None

    assert free.output_schema is None
    assert free.dump_output({"a": (1, None)}) == {"a": [1, None]}
    with pytest.raises(InvalidInput, match="type Item at a"):
        free.dump_output({"a": Item(name="tea")})


# --- codecs ---


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (MISSING, None),
        (MISSING, {"a": [1, 2.5, True, None, "é\n\U0001f600"]}),
        (MISSING, 10**30),
        (str, "x"),
        (int, -4),
        (bool, True),
        (float, 2),
        (type(None), None),
        (Order, Order(items=[Item(name="tea")], due=date(2031, 5, 1))),
        (Aliased, Aliased(No=1, day=date(2031, 5, 1))),
        (list[Item], [Item(name="tea")]),
        (Order | None, None),
        (Point, Point(1, 2)),
        (Row, {"id": 1}),
        (Color, Color.RED),
        (datetime, datetime(2031, 5, 1, 12)),
        (set[int], {3, 1}),
        (tuple[int, str], (1, "a")),
        (dict[int, str], {1: "a"}),
        (bytes, b"\x89PNG\xff"),
        (Annotated[int, Field(gt=1)], 2),
    ],
)
def test_a_value_comes_back_from_json_as_it_was(annotation: Any, value: Any) -> None:
    text, live = codec(annotation).encode(value)
    assert live == value
    assert type(live) is type(value) or annotation is float
    assert codec(annotation).decode(text) == value


def test_live_a_value_is_what_replay_will_read() -> None:
    assert codec().encode((1, (2,))) == ("[1,[2]]", [1, [2]])
    assert codec(list[int]).encode((1, 2)) == ("[1,2]", [1, 2])


@pytest.mark.parametrize(
    ("annotation", "value", "reason"),
    [
        (MISSING, float("nan"), "nan has no JSON form"),
        (MISSING, {"a": [0, float("inf")]}, r"inf at a\[1\]"),
        (MISSING, {"a": {1: 2}}, "dict key of type int at a"),
        (MISSING, [{1}], r"type set at \[0\]"),
        (MISSING, b"x", "type bytes is"),
        (MISSING, "\ud800", "surrogate"),
        (MISSING, Item(name="tea"), "annotate"),
        (str, "\ud800", "surrogate"),
        (int, "5", "comes back from JSON as 5, not as '5'"),
        (int, None, "no valid int"),
        (type(None), 5, "no valid None"),
        (float, float("nan"), "no valid float"),
        (float | None, float("nan"), "as None, not as nan"),
        (list[Item], [3], "no valid list"),
        (SecretStr, SecretStr("hush"), "comes back"),
        (Any, object(), "type object"),
    ],
)
def test_a_value_that_does_not_survive_json_is_refused_with_the_reason(
    annotation: Any, value: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        codec(MISSING if annotation is Any else annotation).encode(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="holds itself"):
        codec().encode(value)


def test_a_kept_value_that_its_annotation_no_longer_admits_is_refused() -> None:
    with pytest.raises(ValueError, match="name: Field required"):
        codec(Item).decode('{"title":"tea"}')


def test_a_type_that_has_no_json_form_means_plain_json() -> None:
    class Opaque:
        pass

    assert codec(Opaque).adapter is None
    assert codec(Opaque | None).encode(None) == ("null", None)


def test_a_value_from_outside_is_loaded_with_its_problems_named() -> None:
    assert codec(Item).load({"name": "tea"}) == Item(name="tea")
    assert problems_of(codec(Item).load, {"name": 1, "price": "x"})[1].startswith("price: ")
    assert codec(Item).schema["required"] == ["name"]


def test_what_a_callable_returns_is_found_however_it_is_wrapped() -> None:
    async def hidden(page: Page) -> list[Item]: ...
    def awaited(page: Page) -> Awaitable[int]: ...
    def anything() -> Any: ...
    def unknown() -> Page: ...

    class Callable:
        def __call__(self) -> Item: ...

        async def method(self) -> Point: ...

    assert annotation_of(hidden) == list[Item]
    assert annotation_of(partial(partial(hidden), None)) == list[Item]
    assert annotation_of(awaited) is int
    assert annotation_of(Callable()) is Item
    assert annotation_of(Callable().method) is Point
    assert annotation_of(Item) is Item
    assert annotation_of(buy) is Order
    for fn in (lambda: 1, anything, unknown, len):
        assert annotation_of(fn) is MISSING
