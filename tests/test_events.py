"""Events keep what they are told through JSON and back, and their chain notices every change."""

from __future__ import annotations

import json
from datetime import UTC
from typing import Any, get_args, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mcp_flow import events as ev
from mcp_flow.errors import BrokenChain

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
moments = st.datetimes(timezones=st.just(UTC))
failures = st.builds(
    ev.Failure,
    type=texts,
    message=texts,
    step=st.none() | texts,
    file=st.none() | texts,
    line=st.none() | st.integers(),
    source=st.none() | texts,
    artifacts=st.lists(texts, max_size=2),
)

# What a field's annotation allows; a field of another kind fails here until somebody says what it holds.
_BY_ANNOTATION: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    str | None: st.none() | texts,
    int: st.integers(),
    int | None: st.none() | st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    float | None: st.none() | st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    Any: json_values,
    dict[str, Any]: st.dictionaries(texts, json_values, max_size=3),
    dict[str, Any] | None: st.none() | st.dictionaries(texts, json_values, max_size=3),
    tuple[int, int] | None: st.none() | st.tuples(st.integers(), st.integers()),
    ev.Failure: failures,
    ev.RequestOpened: st.deferred(lambda: instances(ev.RequestOpened)),
    list[str]: st.lists(texts, max_size=3),
}


def values(annotation: Any) -> st.SearchStrategy[Any]:
    if annotation in _BY_ANNOTATION:
        return _BY_ANNOTATION[annotation]
    if get_origin(annotation) is not None and "datetime" in str(annotation):
        return st.none() | moments
    return st.sampled_from(get_args(annotation))


def instances(cls: type[ev.Event]) -> st.SearchStrategy[ev.Event]:
    return st.builds(cls, **{name: values(field.annotation) for name, field in cls.model_fields.items()})


any_event = st.sampled_from(sorted(ev.TYPES)).flatmap(lambda name: instances(ev.TYPES[name]))


@pytest.mark.parametrize("name", sorted(ev.TYPES))
def test_an_event_of_every_type_comes_back_from_its_stored_form_as_it_was(name: str) -> None:
    @given(instances(ev.TYPES[name]))
    def comes_back(event: ev.Event) -> None:
        assert ev.decode(event.type, event.encoded()) == event

    comes_back()


@given(any_event)
def test_the_stored_form_is_one_line_of_json_without_defaults(event: ev.Event) -> None:
    stored = event.encoded()
    assert "\n" not in stored
    for name, value in json.loads(stored).items():
        assert value is not None or type(event).model_fields[name].default is not None


def test_the_names_of_the_events_are_frozen() -> None:
    assert sorted(ev.TYPES) == [
        "artifact.kept",
        "attempt.compared",
        "attempt.idled",
        "attempt.started",
        "event.received",
        "hijack.expired",
        "hijack.released",
        "hijack.requested",
        "log.written",
        "page.acted",
        "page.attached",
        "page.closed",
        "page.evaluated",
        "page.lost",
        "page.observed",
        "page.opened",
        "progress.reported",
        "request.answered",
        "request.expired",
        "request.opened",
        "request.shared",
        "request.withdrawn",
        "run.budgeted",
        "run.cancelled",
        "run.claimed",
        "run.created",
        "run.failed",
        "run.finished",
        "run.hijacked",
        "run.orphaned",
        "run.parked",
        "run.released",
        "run.resumed",
        "step.doubted",
        "step.failed",
        "step.finished",
        "step.nondeterministic",
        "step.reset",
        "step.settled",
        "step.shared",
        "step.started",
        "value.recorded",
        "worker.blocked",
    ]


def test_every_event_class_is_among_the_types() -> None:
    named = {*ev.Event.__subclasses__(), *ev.OfStep.__subclasses__()} - {ev.OfStep}
    assert set(ev.TYPES.values()) == named


def test_a_type_from_a_newer_version_is_refused_by_its_name() -> None:
    with pytest.raises(BrokenChain, match=r"run\.teleported"):
        ev.decode("run.teleported", "{}")


def test_a_field_that_the_type_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        ev.decode("run.released", '{"reason": "done", "colour": "red"}')


Entry = tuple[str, int, str, int | None, str, str]  # run, seq, at, epoch, type, data
one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=12)
entries: st.SearchStrategy[Entry] = st.tuples(
    one_line, st.integers(1), one_line, st.none() | st.integers(0), one_line, texts
)


def digest(entry: Entry) -> bytes:
    run, *rest = entry
    return ev.chain(ev.genesis(run), *rest)  # type: ignore[arg-type]


@given(entries, st.data())
def test_the_chain_notices_any_change_of_any_single_field(entry: Entry, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(entry) - 1))
    other = data.draw(entries)[place]
    assume(other != entry[place])
    changed = (*entry[:place], other, *entry[place + 1 :])
    assert digest(changed) != digest(entry)  # type: ignore[arg-type]


@given(entries, entries)
def test_two_different_entries_never_share_a_hash(one: Entry, other: Entry) -> None:
    assume(one != other)
    assert digest(one) != digest(other)


def test_an_entry_depends_on_the_one_before_it() -> None:
    first = ev.chain(ev.genesis("r"), 1, "t", None, "a", "{}")
    assert ev.chain(first, 2, "t", 1, "b", "{}") != ev.chain(ev.genesis("r"), 2, "t", 1, "b", "{}")
