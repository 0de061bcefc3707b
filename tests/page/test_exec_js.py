"""Evaluating code in a page: its forms, its values, its limits, and what read mode refuses."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.async_api import Dialog, Page, Route
from seeing import HOSTILE

from mcp_flow.errors import EvaluationError, FlowError, InvalidInput, PageGone
from mcp_flow.page import place
from mcp_flow.page.access import cdp_session
from mcp_flow.page.exec_js import Evaluation, evaluate
from mcp_flow.page.guard import HIDDEN
from mcp_flow.page.looks import Looks
from mcp_flow.page.snapshot import look
from mcp_flow.tools.page import shown
from mcp_flow.tools.register import answer

pytestmark = pytest.mark.anyio

Mode = Literal["read", "write"]
both = pytest.mark.parametrize("mode", ["read", "write"])


async def serve(page: Page, pages: dict[str, str]) -> None:
    """Serves `pages` under http://shop.test/ and http://other.test/ and opens the first."""

    async def answer(route: Route) -> None:
        body = pages.get(route.request.url.partition(".test/")[2])
        await route.fulfill(status=200 if body else 404, body=body or "", content_type="text/html")

    await page.route("**/*", answer)
    await page.goto(f"http://shop.test/{next(iter(pages))}")


@both
@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 1", 2),
        ("document.title;", "T"),
        ("{a: 1}", {"a": 1}),
        ("return 3", 3),
        ("let x = 4; // four\nreturn x", 4),
        ("let x = 4", None),
        ("'return'", "return"),
        ("1 // one", 1),
        ("() => 5", 5),
        ("function f() { return 6 }", 6),
        ("// seven\n(function () { return 7 });", 7),
        ("[() => 1].length", 1),
        ("({async: 1}).async", 1),
    ],
)
async def test_code_is_an_expression_or_statements_or_a_function(page: Page, mode: Mode, code: str, value: Any) -> None:
    await page.set_content("<title>T</title>")
    assert (await evaluate(page, code, mode=mode)).value == value


@both
@pytest.mark.parametrize(
    ("code", "kind", "value"),
    [
        ("undefined", "undefined", None),
        ("null", "null", None),
        ("true", "boolean", True),
        ("'\\ud800\\u{1f600}'", "string", "\ufffd\U0001f600"),
        ("NaN", "number", "NaN"),
        ("-Infinity", "number", "-Infinity"),
        ("-0", "number", "-0"),
        ("1.5e300", "number", 1.5e300),
        ("10n ** 20n", "bigint", "1" + "0" * 20),
        ("Symbol('s')", "symbol", "Symbol(s)"),
        (
            "[1, NaN, undefined, , 2n]",
            "array",
            [1, {"$number": "NaN"}, {"$undefined": None}, {"$undefined": None}, {"$bigint": "2"}],
        ),
        ("new Date(0)", "Date", "1970-01-01T00:00:00.000Z"),
        ("new Date(NaN)", "Date", "Invalid Date"),
        ("/a\\/b/gi", "RegExp", "/a\\/b/gi"),
        (
            "[/x/, {r: /y/}, {$RegExp: 0}]",
            "array",
            [{"$RegExp": "/x/"}, {"r": {"$RegExp": "/y/"}}, {"$Object": {"$RegExp": 0}}],
        ),
        ("new TypeError('no')", "Error", "TypeError: no"),
        ("new Map([[{a: 1}, new Set([1])]])", "Map", [[{"a": 1}, {"$Set": [1]}]]),
        ("new Set(['a'])", "Set", ["a"]),
        ("new Uint8Array([1, 2])", "Uint8Array", [1, 2]),
        ("[new Float64Array([-0])]", "array", [{"$Float64Array": [{"$number": "-0"}]}]),
        ("new ArrayBuffer(3)", "ArrayBuffer", "3 bytes"),
        ("(() => { const a = {b: {}}; a.b.c = a; return a })()", "object", {"b": {"c": {"$cycle": "$"}}}),
        ("(() => { const s = {x: 1}; return [s, s] })()", "array", [{"x": 1}, {"x": 1}]),
        ("document.querySelector('p')", "Element", '<p id="p" class="big">Hello there'),
        ("document.querySelectorAll('p')", "NodeList", [{"$Element": '<p id="p" class="big">Hello there'}]),
        ("document.querySelector('p').firstChild", "Node", '#text "Hello   there"'),
        ("document", "Document", "#document about:blank"),
        ("window", "Window", "[Window]"),
        ("alert", "function", "function alert() { [native code] }"),
        ("Object.create(null)", "object", {}),
    ],
)
async def test_every_kind_of_value_comes_back_tagged(page: Page, mode: Mode, code: str, kind: str, value: Any) -> None:
    await page.set_content("<p id=p class=big>Hello   there</p>")
    result = await evaluate(page, code, mode=mode)
    assert (result.type, result.value, result.cut) == (kind, value, False)
    json.dumps(result.value, allow_nan=False).encode()


async def test_a_getter_that_throws_does_not_take_the_other_fields_with_it(page: Page) -> None:
    result = await evaluate(page, "({a: 1, get b() { throw new Error('no') }})", mode="write")
    assert result.value == {"a": 1, "b": {"$thrown": "no"}}


@both
async def test_a_value_beyond_the_budget_is_cut_and_says_so(page: Page, mode: Mode) -> None:
    text = await evaluate(page, "'x'.repeat(20000)", mode=mode, max_chars=1000)
    assert (text.value, text.cut) == ("x" * 1000, True)
    assert text.type == "string, cut: the first 1000 of 20000 characters of its text"

    listed = await evaluate(page, "Array.from({length: 100000}, (_, i) => i)", mode=mode, max_chars=1000)
    assert listed.cut
    assert listed.type == "array, cut: the first 1000 characters of its JSON"
    assert listed.value.startswith("[0,1,2,")
    assert len(listed.value) == 1000

    deep = await evaluate(page, "let a = []; for (let i = 0; i < 500; i++) a = [a]; return a", mode=mode)
    assert deep.cut


@both
@pytest.mark.parametrize(
    ("code", "value"),
    [
        (f"() => '{'x' * 300}'", f"() => '{'x' * 193}…"),
        ("document.querySelector('a').firstChild", f'#text "{"y" * 60}…"'),
        ("document.querySelector('a')", f'<a id="{"z" * 40}…">{"y" * 60}…'),
        ("document.querySelector('p')", "<p>a …"),
        ("({[Symbol('key')]: 1, b: 2})", {"b": 2}),
    ],
)
async def test_what_is_left_out_of_a_description_or_an_object_is_said(
    page: Page, mode: Mode, code: str, value: Any
) -> None:
    await page.set_content(f"<a id={'z' * 50}>{'y' * 61}</a><p>a{' ' * 500}b</p>")
    result = await evaluate(page, f"[{code}]", mode=mode)
    assert (result.abridged, result.cut) == (True, False)
    [shown] = result.value
    assert shown == value or list(shown.values()) == [value]
    assert not (await evaluate(page, "[{a: 1}, () => 1, document.head]", mode=mode)).abridged


@pytest.mark.parametrize(
    "code",
    [
        "document.title = 'changed'",
        "document.body.innerHTML = ''",
        "document.body.click()",
        "window.changed = 1",
        "fetch('/x')",
        "location.href = '/x'",
        "history.pushState({}, '', '/x')",
        "setTimeout(() => { document.title = 'changed' })",
        "try { document.title = 'changed' } catch {}",
        "1), (document.title = 'changed', 0",
        "({get a() { document.title = 'changed' }})",
        "({then() { document.title = 'changed' }})",
        "() => ({then() { document.title = 'changed' }})",
        "(async () => ({then() { document.title = 'changed' }}))()",
        "async () => ({then() { document.title = 'changed' }})",
        "await null; document.title = 'changed'",
        "({async m() { return {then() { document.title = 'changed' }} }}).m()",
        "settled.then(() => { document.title = 'changed' })",
        "({toJSON() { document.title = 'changed' }, toString() { document.title = 'changed' }})",
    ],
)
async def test_read_mode_lets_nothing_change_the_page(page: Page, code: str) -> None:
    await serve(page, {"": "<title>T</title><p>x</p><script>settled = Promise.resolve(1)</script>"})
    html = await page.content()
    with suppress(EvaluationError):
        await evaluate(page, code)
    assert await page.evaluate("new Promise(done => setTimeout(() => done(document.title), 20))") == "T"
    assert await page.content() == html
    assert await page.evaluate("window.changed") is None


async def test_read_mode_reads_the_dom_styles_rects_and_promises(page: Page) -> None:
    await serve(page, {"": "<p style='color: red'>x</p><script>ready = Promise.resolve(new Map([[1, /r/]]))</script>"})
    assert (await evaluate(page, "[...document.querySelectorAll('p')].map(p => p.textContent)")).value == ["x"]
    assert (await evaluate(page, "getComputedStyle(document.querySelector('p')).color")).value == "rgb(255, 0, 0)"
    rect = await evaluate(page, "document.querySelector('p').getBoundingClientRect()")
    assert rect.type == "DOMRect"
    assert rect.value["x"] == 8
    ready = await evaluate(page, "ready")
    assert (ready.type, ready.value) == ("Map", [[1, {"$RegExp": "/r/"}]])


async def test_a_refused_side_effect_says_that_nothing_changed_and_how_to_write(page: Page) -> None:
    with pytest.raises(EvaluationError, match=r'the page was not changed.*mode="write" on a stopped run'):
        await evaluate(page, "document.title = 'x'")


@both
@pytest.mark.parametrize("code", ["while (true);", "for (;;) { document.title }"])
async def test_an_endless_loop_ends_at_the_timeout_with_the_page_alive(own_page: Page, mode: Mode, code: str) -> None:
    await own_page.set_content("<title>T</title>")
    with pytest.raises(EvaluationError, match="did not end within 100 ms"):
        await evaluate(own_page, code, mode=mode, timeout_ms=100)
    assert (await evaluate(own_page, "document.title")).value == "T"


@pytest.mark.parametrize("waited", ["null", "new Promise(done => setTimeout(done))"])
async def test_a_loop_after_an_await_ends_at_the_timeout_too(own_page: Page, waited: str) -> None:
    with pytest.raises(EvaluationError, match="did not end within 100 ms"):
        await evaluate(own_page, f"await {waited}; while (true);", mode="write", timeout_ms=100)
    assert (await evaluate(own_page, "1")).value == 1


@both
async def test_a_promise_that_never_settles_ends_at_the_timeout(page: Page, mode: Mode) -> None:
    await serve(page, {"": "<script>never = new Promise(() => {})</script>"})
    with pytest.raises(EvaluationError, match="did not end within 100 ms: a promise did not settle"):
        await evaluate(page, "never", mode=mode, timeout_ms=100)
    assert (await evaluate(page, "1")).value == 1


@both
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("throw new TypeError('boo')", r"The code threw at its line 1:\n<<page text (.|\n)*\nTypeError: boo\n<<end"),
        ("let a = 1\nnull.x", r"The code threw at its line 2:\n<<(.|\n)*Cannot read properties of null"),
        ("let a\nfoo(", r"SyntaxError: .*\(line 2 of the code\)"),
        ("throw {code: 7}", r"The code threw.*:\n<<page text .*\nObject {code: 7}\n<<end"),
        ("throw 'text'", r"The code threw.*:\n<<page text .*\ntext\n<<end"),
    ],
)
async def test_what_the_code_throws_is_an_error_with_its_place(page: Page, mode: Mode, code: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        await evaluate(page, code, mode=mode)


async def test_an_element_that_takes_long_to_find_is_found(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    await page.set_content("<button>one</button><button>two</button>")
    monkeypatch.setattr(place, "KEEP_SECONDS", 0.001)
    assert (await evaluate(page, "element.textContent", locator="text=two")).value == "two"


async def test_a_page_that_refuses_to_keep_an_element_is_said_to(page: Page) -> None:
    await page.set_content("<button>one</button>")
    await page.evaluate("() => { Object.defineProperty = () => { throw new Error('not here') } }")
    with pytest.raises(FlowError, match="not here"):
        await evaluate(page, "element.textContent", locator="button")


@both
async def test_a_ref_or_locator_binds_the_element(own_page: Page, mode: Mode) -> None:
    page = own_page
    await page.set_content("<button>One</button><button>Two</button>")
    text = (await look(page, looks=Looks(), key=("r", "main"), facts=[], call="")).text
    ref = text.split('"Two" [ref=')[1].split("]")[0]

    assert (await evaluate(page, "element.textContent", mode=mode, ref=ref)).value == "Two"
    assert (await evaluate(page, "return element.textContent", mode=mode, ref=ref)).value == "Two"
    assert (await evaluate(page, "e => e.textContent", mode=mode, locator="text=One")).value == "One"
    assert await page.evaluate("Reflect.ownKeys(window).filter(k => String(k).includes('mcp'))") == []


@both
async def test_an_element_in_a_frame_is_bound_in_its_frame(own_page: Page, mode: Mode) -> None:
    page = own_page
    inner = "<title>Inner</title><button>In</button><script>place = location.host</script>"
    frames = "<iframe src=http://shop.test/inner></iframe><iframe src=http://other.test/inner></iframe>"
    await serve(page, {"": f"<title>Outer</title>{frames}", "inner": inner})
    text = (await look(page, looks=Looks(), key=("r", "main"), facts=[], call="")).text
    refs = [part.split("]")[0] for part in text.split('"In" [ref=')[1:]]
    assert len(refs) == 2

    hosts = [
        (await evaluate(page, "[place, document.title, element.textContent]", mode=mode, ref=ref)).value for ref in refs
    ]

    assert sorted(hosts) == [["other.test", "Inner", "In"], ["shop.test", "Inner", "In"]]
    left = [await f.evaluate("Reflect.ownKeys(window).filter(k => String(k).includes('mcp'))") for f in page.frames]
    assert left == [[], [], []]


async def test_an_element_that_is_not_exactly_one_is_refused_at_once(own_page: Page) -> None:
    await own_page.set_content("<p>a</p><p>b</p>")
    async with asyncio.timeout(3):
        with pytest.raises(EvaluationError, match="matches 2 elements"):
            await evaluate(own_page, "1", locator="p")
        for ref in ["e99", "f7e1"]:
            with pytest.raises(EvaluationError, match="matches 0 elements; take a new snapshot"):
                await evaluate(own_page, "1", ref=ref)
        with pytest.raises(EvaluationError, match="no selector"):
            await evaluate(own_page, "1", locator="p >> [")
        with pytest.raises(InvalidInput, match="one of them"):
            await evaluate(own_page, "1", ref="e1", locator="p")
        with pytest.raises(InvalidInput, match="empty"):
            await evaluate(own_page, "  ")


@both
async def test_values_of_secret_fields_never_leave(page: Page, mode: Mode) -> None:
    await page.set_content(
        "<input type=password id=a value=hunter22><input type=password id=b value=xy>"
        "<input autocomplete=cc-number id=c value=4111111111111111>"
    )
    assert (await evaluate(page, "a.value", mode=mode)).value == HIDDEN
    assert (await evaluate(page, "b.value", mode=mode)).value == HIDDEN
    assert (await evaluate(page, "Number(c.value)", mode=mode)).value == HIDDEN
    result = await evaluate(page, "({['k' + a.value]: ['<' + a.value + '>', b.value, 'sexy']})", mode=mode)
    assert result.value == {f"k{HIDDEN}": [f"<{HIDDEN}>", HIDDEN, "sexy"]}
    with pytest.raises(EvaluationError) as caught:
        await evaluate(page, "throw new Error(a.value)", mode=mode)
    assert "hunter22" not in str(caught.value)


async def test_a_password_that_a_page_sets_before_it_is_busy_does_not_leave_when_it_answers_late(page: Page) -> None:
    await page.set_content("<input type=password id=a>")

    async def be_busy() -> None:
        busy = "const end = Date.now() + 1500; while (Date.now() < end);"
        await page.evaluate(f"() => {{ a.value = 'late-secret'; setTimeout(() => {{ {busy} }}) }}")

    assert (await evaluate(page, "a.value", take=be_busy)).value == HIDDEN
    slow = "const held = a.value, end = Date.now() + 1500; while (Date.now() < end); return held"
    assert (await evaluate(page, slow)).value == HIDDEN


async def test_a_password_that_is_typed_while_code_waits_for_it_does_not_leave_either(page: Page) -> None:
    await page.set_content("<input type=password id=a>")
    await page.evaluate(
        "() => { later = new Promise(done => { type = () => { a.value = 'typed-late'; done(a.value) } }) }"
    )
    read, _ = await asyncio.gather(evaluate(page, "later"), page.evaluate("() => { setTimeout(type, 100) }"))
    assert read.value == HIDDEN


async def test_a_password_that_the_code_sets_or_clears_does_not_leave_either(page: Page) -> None:
    await page.set_content("<input type=password id=a value=hunter22>")
    code = "const old = a.value; a.value = 'fresh-secret'; console.log(old, a.value); return [old, a.value]"
    result = await evaluate(page, code, mode="write")
    assert result.value == [HIDDEN, HIDDEN]
    assert result.console == (f"log: {HIDDEN} {HIDDEN}",)


async def test_write_mode_changes_the_page_and_hands_back_console_lines(page: Page) -> None:
    code = "console.log('one', 1); console.error('two\\u202e'); document.title = await Promise.resolve('new')"
    result = await evaluate(page, code + "; return 5", mode="write")
    assert result == Evaluation(5, "number", ("log: one 1", "error: two"), None, result.ms, False)
    assert 0 < result.ms < 5000
    assert await page.title() == "new"
    many = await evaluate(page, "for (let i = 0; i < 80; i++) console.log('x'.repeat(9000))", mode="write")
    assert (len(many.console), many.unheard) == (50, 30)
    assert sum(map(len, many.console)) < 30000


async def test_a_navigation_is_reported_with_its_new_url(own_page: Page) -> None:
    await serve(own_page, {"": "<p>first", "next": "<title>Next</title>"})
    result = await evaluate(own_page, "location.href = '/next'; return 5", mode="write")
    assert (result.value, result.navigated) == (5, "http://shop.test/next")
    assert await own_page.title() == "Next"

    result = await evaluate(own_page, "location.href = '/'; return new Promise(() => {})", mode="write")
    assert (result.type, result.navigated) == ("undefined", "http://shop.test/")

    result = await evaluate(own_page, "history.pushState({}, '', '/pushed')", mode="write")
    assert result.navigated == "http://shop.test/pushed"
    assert (await evaluate(own_page, "1", mode="write")).navigated is None


async def test_calls_to_one_page_queue_and_none_gets_the_result_of_another(page: Page) -> None:
    await page.set_content("<p>x</p>")
    await page.evaluate("window.inside = 0")
    code = "if (inside++) throw new Error('two at once'); await new Promise(requestAnimationFrame); inside--; return "
    results = await asyncio.gather(*(evaluate(page, f"{code}{n}", mode="write") for n in range(3)))
    assert [result.value for result in results] == [0, 1, 2]
    values = await asyncio.gather(*(evaluate(page, str(n)) for n in range(5)))
    assert [result.value for result in values] == list(range(5))


async def test_dialogs_that_the_code_opens_are_closed_and_reported(page: Page) -> None:
    await page.set_content("<input type=password value=hunter22>")
    code = "alert('one'); return [confirm(document.querySelector('input').value), prompt('\\u202ewho')]"
    result = await evaluate(page, code, mode="write")
    assert result.value == [False, None]
    assert result.dialogs == ('alert "one" dismissed', f'confirm "{HIDDEN}" dismissed', 'prompt "who" dismissed')
    assert (await evaluate(page, "1", mode="write")).dialogs == ()


async def test_reading_leaves_the_dialogs_of_the_page_to_the_workflow(page: Page) -> None:
    opened: asyncio.Queue[Dialog] = asyncio.Queue()

    def asked(dialog: Dialog) -> None:
        opened.put_nowait(dialog)

    page.on("dialog", asked)
    await page.evaluate("setTimeout(() => { said = confirm('mine') })")
    reading = asyncio.create_task(evaluate(page, "typeof said"))
    await (await opened.get()).accept()
    await reading
    assert (await evaluate(page, "said")).value is True


async def test_a_session_is_opened_once_and_outlives_its_documents(page: Page) -> None:
    await serve(page, {"": "<title>One</title>"})
    first = await cdp_session(page)
    assert (await evaluate(page, "document.title")).value == "One"
    await page.goto("http://other.test/")
    assert (await evaluate(page, "location.host", mode="write")).value == "other.test"
    assert await cdp_session(page) is first


def tagged(kind: str, value: Any) -> Any:
    return {f"${kind}": value}


def array(pairs: list[tuple[str, Any]]) -> tuple[str, Any]:
    return f"[{','.join(code for code, _ in pairs)}]", [value for _, value in pairs]


def plain(pairs: dict[str, tuple[str, Any]]) -> tuple[str, Any]:
    code = ",".join(f"[{json.dumps(key)}]: {code}" for key, (code, _) in pairs.items())
    value = {key: value for key, (_, value) in pairs.items()}
    alike = len(value) == 1 and next(iter(value)).startswith("$")
    return f"{{{code}}}", tagged("Object", value) if alike else value


def mapped(pairs: list[tuple[tuple[str, Any], tuple[str, Any]]]) -> tuple[str, Any]:
    entries = [array([(json.dumps(f"{n}"), f"{n}"), pair]) for n, (_, pair) in enumerate(pairs)]
    code, value = array(entries)
    return f"new Map({code})", tagged("Map", value)


leaves = st.one_of(
    st.sampled_from(
        [
            ("null", None),
            ("true", True),
            ("undefined", tagged("undefined", None)),
            ("NaN", tagged("number", "NaN")),
            ("-Infinity", tagged("number", "-Infinity")),
            ("-0", tagged("number", "-0")),
            ("new Date(86400000)", tagged("Date", "1970-01-02T00:00:00.000Z")),
            ("/a\\/[b]/gi", tagged("RegExp", "/a\\/[b]/gi")),
            ("new RangeError('far')", tagged("Error", "RangeError: far")),
            ("document.head", tagged("Element", "<head>")),
        ]
    ),
    st.integers(-(2**53) + 1, 2**53 - 1).map(lambda number: (f"({number})", number)).filter(lambda pair: pair[1] != 0),
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda n: n != 0).map(lambda n: (f"({n!r})", n)),
    st.integers().map(lambda number: (f"({number}n)", tagged("bigint", str(number)))),
    st.text().map(lambda text: (json.dumps(text), text)),
    st.lists(st.integers(0, 255), max_size=9).map(lambda b: (f"new Uint8Array({b})", tagged("Uint8Array", b))),
    st.lists(st.integers(-9, 9), unique=True).map(lambda items: (f"new Set({items})", tagged("Set", items))),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5).map(array),
        st.dictionaries(st.text(max_size=5) | st.sampled_from(["$Map", "__proto__"]), inner, max_size=4).map(plain),
        st.lists(st.tuples(inner, inner), max_size=3).map(mapped),
    ),
    max_leaves=25,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=values, mode=st.sampled_from(["read", "write"]), max_chars=st.sampled_from([40, 500, 8000]))
async def test_any_value_round_trips_or_is_said_to_be_cut(
    page: Page, pair: tuple[str, Any], mode: Mode, max_chars: int
) -> None:
    code, value = pair
    result = await evaluate(page, f"[{code}]", mode=mode, max_chars=max_chars)
    full = json.dumps([value], ensure_ascii=False, separators=(",", ":"))
    if result.cut:
        assert result.type.startswith("array, cut: the first ")
        assert len(result.value) <= max_chars < 2 * len(full)
    else:
        assert (result.type, result.value) == ("array", [value])


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(texts=HOSTILE)
async def test_any_page_text_whatever_stays_inside_its_markers(page: Page, texts: list[str]) -> None:
    value, tag, line, thrown = map(json.dumps, texts)
    code = (
        f"console.log({line}); return {{[Symbol.toStringTag]: {tag}, get [{tag}]() {{ throw {thrown} }}, v: {value}}}"
    )
    result = await evaluate(page, code, mode="write")
    raw = answer(shown(result, "r1", "paused", 8000, "resume()")).content[0].text
    raw.encode()
    fields = list(json.loads(raw))
    assert fields[fields.index("untrusted") :] == ["untrusted", "value", "type", "console", "end"]
    assert set(fields[: fields.index("untrusted")]) <= {"run_id", "status", "ms", "cut", "next"}
    nonce = re.search(r'"untrusted":"<<page text (\w{12}): ', raw)
    assert nonce
    assert raw.count(nonce[1]) == 3, "twice in the first marker, once in the last"
    with pytest.raises(EvaluationError) as caught:
        await evaluate(page, f"throw 'x' + {value} + {thrown}")
    first, marker, *_, last = str(caught.value).split("\n")
    assert first in ("The code threw:", "The code threw at its line 1:")
    assert marker.startswith("<<page text ")
    assert re.fullmatch(r"<<end \w{12}>>", last)


async def test_a_closed_page_is_gone(own_page: Page) -> None:
    await own_page.close()
    with pytest.raises(PageGone, match="get_run"):
        await evaluate(own_page, "1")


async def test_a_crashed_page_is_gone(own_page: Page) -> None:
    with pytest.raises(Exception, match="crash"):
        await own_page.goto("chrome://crash")
    with pytest.raises(PageGone, match="get_run"):
        await evaluate(own_page, "1")


async def test_an_evaluation_leaves_the_requested_pause_to_the_workflow(own_page: Page) -> None:
    await own_page.set_content("<button>Buy</button>")
    debugger, paused = own_page.context.debugger, asyncio.Event()
    debugger.on("pausedstatechanged", lambda *_: paused.set())
    await debugger.request_pause()

    async with asyncio.timeout(8):
        assert (await evaluate(own_page, "element.textContent", locator="button")).value == "Buy"
        assert debugger.paused_details is None
        click = asyncio.ensure_future(own_page.get_by_role("button").click())
        await paused.wait()
        assert (await evaluate(own_page, "e => e.textContent", locator="button", mode="write")).value == "Buy"
        await debugger.resume()
        await click
