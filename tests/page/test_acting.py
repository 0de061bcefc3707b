"""Acting on a page over a connection of its own: what is done, healed, reported, recorded and refused."""

from __future__ import annotations

import ast
import asyncio
import re
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from playwright.async_api import Browser, Page, Request, async_playwright
from seeing import HOSTILE, inside, outside

from mcp_flow.errors import ActionFailed, InvalidInput, PageGone, StaleRef
from mcp_flow.page import act as engine
from mcp_flow.page.act import Acted, Healed, Opened, act, report
from mcp_flow.page.actions import checked
from mcp_flow.page.exec_js import evaluate
from mcp_flow.page.guard import HIDDEN, clean
from mcp_flow.page.tree import parse

pytestmark = pytest.mark.anyio


class Site:
    """Pages served from memory; `/held` answers when `release` is set, `/hang` never, `/endless` never ends."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.release = asyncio.Event()
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not (line := await reader.readline()):
            return
        path = line.split()[1].decode().lstrip("/")
        while (await reader.readline()).strip():
            pass
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nConnection: close\r\n"
        if path == "held":
            await self.release.wait()
        if path == "hang":
            await reader.read()
        if path == "file":
            head += 'Content-Disposition: attachment; filename="report.csv"\r\n'
        body = self.pages.get(path, f"<title>{path}</title>").encode()
        length = "" if path == "endless" else f"Content-Length: {len(body)}\r\n"
        writer.write(f"{head}{length}\r\n".encode() + body)
        await writer.drain()
        if path == "endless":
            await reader.read()
        writer.close()


@asynccontextmanager
async def served() -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.answer, "127.0.0.1", 0)
    site.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield site
    server.close()


@pytest.fixture(scope="module")
async def connected(browser: Browser) -> AsyncIterator[Browser]:
    """A connection to the browser such as the tools have, beside the one that owns it."""
    endpoint = (await browser.bind("test"))["endpoint"]
    async with async_playwright() as playwright:
        yield await playwright.chromium.connect(endpoint)


@pytest.fixture
async def page(connected: Browser) -> AsyncIterator[Page]:
    context = await connected.new_context(viewport={"width": 800, "height": 600})
    yield await context.new_page()
    await context.close()


class Eyes:
    """The agent's looks at a page: refs by role and name, and the whole snapshot as the difference."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.refs: dict[str, tuple[str, str | None]] = {}
        self.looks = 0

    async def __call__(self) -> str:
        self.looks += 1
        text = await self.page.aria_snapshot(mode="ai", timeout=5000)
        self.refs = {line.ref: (line.role, line.name) for line in parse(text) if line.ref}
        return text

    def ref(self, name: str) -> str:
        return next(ref for ref, (_, held) in self.refs.items() if held == name)

    async def act(self, *actions: dict[str, Any], **given: Any) -> Acted:
        return await act(self.page, actions, observe=self, known=self.refs.get, **given)


async def look_at(page: Page, html: str) -> Eyes:
    await page.set_content(html)
    eyes = Eyes(page)
    await eyes()
    return eyes


async def run_python(acted: Acted, page: Page, flow: Any = None) -> None:
    """Runs the recorded statements as a workflow would."""
    scope: dict[str, Any] = {}
    body = textwrap.indent("\n".join(acted.python), "    ")
    exec(f"async def pasted(page, flow):\n{body}", scope)
    await scope["pasted"](page, flow)


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ({"op": "tap", "ref": "e1"}, r"actions\[1\]\.op: Input should be 'click', 'type'"),
        ({"op": "click"}, r"actions\[1\]: click needs the element's ref or locator"),
        ({"op": "click", "ref": "e1", "locator": "p"}, r"actions\[1\]: ref and locator both"),
        ({"op": "click", "ref": "12"}, r"actions\[1\]\.ref: "),
        ({"op": "click", "ref": "e1", "button": "right"}, r"actions\[1\]\.button: Extra inputs"),
        ({"op": "click", "ref": "e1", "value": "x"}, r"actions\[1\]\.value: click takes nothing"),
        ({"op": "fill", "ref": "e1"}, r"actions\[1\]\.value: fill needs the text"),
        ({"op": "fill", "ref": "e1", "value": ["a"]}, r"actions\[1\]\.value: fill takes the text"),
        ({"op": "check", "ref": "e1", "value": "yes"}, r"actions\[1\]\.value: check takes true or false"),
        ({"op": "back", "ref": "e1"}, r"actions\[1\]\.ref: back takes no element"),
        ({"op": "wait"}, r"actions\[1\]\.value: wait needs a text"),
        ({"op": "wait", "ref": "e1", "value": "gone"}, r"actions\[1\]\.value: .*visible, hidden"),
        ({"op": "press", "value": ""}, r"actions\[1\]\.value: press needs a key"),
        ({"op": "dialog", "value": "accept"}, r"actions\[1\]: .*put it before the action"),
        ({"op": "upload", "ref": "e1", "value": "/etc/passwd"}, r"actions\[1\]\.value: no such file in a folder"),
        *(
            ({"op": "navigate", "value": url}, r"actions\[1\]\.value: only http: and https:")
            for url in (
                "file:///etc/passwd",
                "javascript:alert(1)",
                " java\nscript:alert(1)",
                "data:text/html,x",
                "chrome://settings",
                "view-source:http://x/",
                "http:///x",
                "shop.example",
            )
        ),
        ("click", r"actions\[1\]: Input should be"),
    ],
)
def test_a_bad_action_is_refused_by_its_field(action: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=rf"Nothing was done[^$]*{problem}"):
        checked([{"op": "back"}, action], [])


async def test_nothing_is_done_where_a_later_action_is_bad(page: Page) -> None:
    eyes = Eyes(page)
    with pytest.raises(InvalidInput):
        await eyes.act({"op": "navigate", "value": "http://127.0.0.1:1/"}, {"op": "navigate", "value": "file:///etc"})
    assert page.url == "about:blank"
    assert eyes.looks == 0


async def test_every_bad_field_is_named_and_there_may_be_ten_actions(page: Page) -> None:
    eyes = Eyes(page)
    with pytest.raises(InvalidInput) as caught:
        await eyes.act({"op": "click"}, {"op": "close"}, {"op": "fill", "ref": "e1"})
    assert len(caught.value.problems) == 3
    for count in (0, 11):
        with pytest.raises(InvalidInput, match=f"1 to 10 actions, not {count}"):
            await eyes.act(*[{"op": "back"}] * count)


FORM = """<form onsubmit="return false">
<label>Name <input id=name></label> <label>Note <textarea id=note></textarea></label>
<label>Size <select id=size><option>S<option>M<option>L</select></label>
<label>Extras <select id=extras multiple><option>Bow<option>Card</select></label>
<label><input type=checkbox id=gift> Gift</label> <label><input type=checkbox id=news checked> News</label>
<button id=pay onclick="log.push('paid')" onmouseover="log.push('over')">Pay "now"</button>
<label>Code <input id=code onkeydown="log.push(event.key)"></label></form><script>log = []</script>"""
STATE = """() => [...document.querySelectorAll("input, textarea, select")].map(
  f => f.type === "checkbox" ? f.checked : f.multiple ? [...f.selectedOptions].map(o => o.value) : f.value
).concat([[...new Set(log)]])"""


async def test_each_op_does_what_it_says_and_the_recorded_python_does_the_same(page: Page) -> None:
    eyes = await look_at(page, FORM)
    first = await eyes.act(
        {"op": "fill", "ref": eyes.ref("Name"), "value": 'Ann "\u202e\n'},
        {"op": "type", "ref": eyes.ref("Note"), "value": "two\nlines"},
        {"op": "select", "ref": eyes.ref("Size"), "value": "M"},
        {"op": "select", "ref": eyes.ref("Extras"), "value": ["Bow", "Card"]},
        {"op": "check", "ref": eyes.ref("Gift")},
        {"op": "check", "ref": eyes.ref("News"), "value": False},
        {"op": "hover", "locator": "#pay"},
        {"op": "click", "ref": eyes.ref('Pay "now"')},
        {"op": "fill", "locator": "#code", "value": 42},
        {"op": "press", "locator": "#code", "value": "End"},
    )
    second = await eyes.act({"op": "press", "value": "x"})

    assert (first.error, second.error) == (None, None)
    state = await page.evaluate(STATE)
    assert state[:7] == ['Ann "\u202e', "two\nlines", "M", ["Bow", "Card"], True, False, "42x"]
    assert state[7] == ["over", "paid", "End", "x"]
    assert first.python[7] == 'await page.get_by_role("button", name="Pay \\"now\\"").click()'
    assert "\u202e" not in "".join(first.python)
    await page.set_content(FORM)
    await run_python(first, page)
    await run_python(second, page)
    assert await page.evaluate(STATE) == state


async def test_the_answer_carries_the_difference_after_one_look(page: Page) -> None:
    eyes = await look_at(page, "<button onclick=\"out.textContent = 'Thanks'\">Pay</button><p id=out></p>")
    eyes.looks = 0
    ref = eyes.ref("Pay")
    acted = await eyes.act({"op": "click", "ref": ref})
    assert acted.done == (f"click {ref}",)
    assert (acted.error, acted.healed, acted.opened, acted.navigated, acted.settled) == (None, (), (), None, True)
    assert "Thanks" in acted.difference
    assert eyes.looks == 1
    text = report(acted)
    assert text.startswith(f"done in {acted.ms:.0f} ms: click {ref}\n<<page text ")
    assert inside(text).startswith("python:\n  await page.")
    assert text.endswith(acted.difference)


async def test_it_stops_at_the_first_that_fails_and_says_what_was_done(page: Page) -> None:
    eyes = await look_at(page, "<input id=a><button>One</button><button>Two</button><button>Three</button>")
    acted = await eyes.act(
        {"op": "fill", "locator": "#a", "value": "x"},
        {"op": "click", "locator": "button"},
        {"op": "fill", "locator": "#a", "value": "y"},
        look='snapshot(run_id="r1")',
    )
    assert acted.done == ("fill #a",)
    assert len(acted.python) == 1
    assert await page.locator("#a").input_value() == "x"
    assert isinstance(acted.error, ActionFailed)
    text = str(acted.error)
    assert text.startswith("actions[1], click button: locator 'button' matches 3 elements")
    assert "Not begun: fill #a." in text
    assert 'snapshot(run_id="r1") shows the whole page' in text
    assert "fill #a\n" in text
    assert "- textbox" in text


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(texts=HOSTILE)
async def test_any_page_text_whatever_stays_inside_its_markers(page: Page, texts: list[str]) -> None:
    await page.set_content(
        "<a id=off href=# style='position: absolute; left: -9999px'>x</a><i id=veil>x</i><b id=b>b</b>"
    )
    write = """([label, asked, address, cover]) => {
        off.ariaLabel = label; off.onclick = () => { alert(asked); location.hash = address };
        veil.setAttribute('aria-label', cover); veil.style = 'position: fixed; inset: 0';
    }"""
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    await page.evaluate(write, texts)

    async def nothing() -> str:
        return "[the page]"

    given: dict[str, Any] = {"observe": nothing, "known": {"e99": ("link", clean(texts[0]))}.get}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ACTION_SECONDS", 0.3)
        pressed = await act(page, [{"op": "press", "locator": "#off", "value": "Enter"}], **given)
        stale = await act(page, [{"op": "hover", "ref": "e99"}], **given)
        covered = await act(page, [{"op": "click", "locator": "#b"}], **given)
    assert covered.error
    for text in (report(pressed), str(stale.error or report(stale)), str(covered.error)):
        text.encode()
        said = re.sub(r"<<page text (\w{12}): [^\n]*>>\n.*\n<<end \1>>\n", "", text, flags=re.DOTALL)
        assert "<<" not in said
        for line in said.split("\n"):
            assert re.match("|".join(SERVER_LINES), line), text


SERVER_LINES = [
    r"done in \d+ ms: (press #off|hover e99|nothing)$",
    r"dialog: alert dismissed$",
    r"navigated: [!-~]+$",
    r"The page has not come to rest yet\.$",
    r"healed: e99 was gone or changed; the only element of its role and name was used$",
    r"actions\[0\], (click #b|hover e99): Timeout \d+ms exceeded\.$",
    r"actions\[0\], hover e99: ref e99(, link without a name .*,)? is gone",
    r"Next: act with what is left, by the refs below; snapshot shows the whole page\.$",
    r"\[the page\]$",
]


async def test_what_is_typed_into_a_plain_field_is_told_also_of_one_in_a_shadow_root_and_of_a_healed_one(
    page: Page,
) -> None:
    shadow = (
        "<div id=host></div><script>host.attachShadow({mode: 'open'}).innerHTML = '<input aria-label=Deep>'</script>"
    )
    eyes = await look_at(page, f"{shadow}<input aria-label=Plain>")
    acted = await eyes.act({"op": "fill", "ref": eyes.ref("Deep"), "value": "two words"})
    assert acted.python == ('await page.get_by_role("textbox", name="Deep").fill("two words")',)
    await page.evaluate("() => { document.querySelector('input').outerHTML = '<input aria-label=Plain>' }")
    acted = await eyes.act({"op": "fill", "ref": eyes.ref("Plain"), "value": "two words"})
    assert acted.healed
    assert acted.python == ('await page.get_by_role("textbox", name="Plain").fill("two words")',)


async def test_an_element_that_is_covered_is_said_to_be(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACTION_SECONDS", 3.0)
    eyes = await look_at(page, "<button>Pay</button><div style='position:fixed;inset:0' id=veil>Wait</div>")
    acted = await eyes.act({"op": "click", "ref": eyes.ref("Pay")})
    assert "intercepts pointer events" in str(acted.error)
    acted = await eyes.act({"op": "click", "locator": "#none"})
    assert "matches 0 elements" in str(acted.error)
    acted = await eyes.act({"op": "click", "locator": "p >> ["})
    assert "is no Playwright selector" in str(acted.error)


async def test_a_locator_is_waited_for(page: Page) -> None:
    eyes = await look_at(page, "<p>x</p>")
    adding = asyncio.create_task(eyes.act({"op": "click", "locator": "#late"}))
    await page.wait_for_function("() => { (window.frames_ ??= 0); return ++frames_ > 5 }")
    await page.evaluate("document.body.innerHTML = '<button id=late onclick=\"this.textContent = 1\">Go</button>'")
    acted = await adding
    assert acted.python == ('await page.get_by_role("button", name="Go").click()',)
    assert await page.locator("#late").text_content() == "1"


async def test_a_stale_ref_is_healed_when_one_element_fits(page: Page) -> None:
    button = "<button onclick=\"clicked = 'Pay'\">Pay</button>"
    eyes = await look_at(page, f"<main>{button}</main><p>old</p>")
    ref = eyes.ref("Pay")
    await page.evaluate("document.querySelector('main').innerHTML += '<p>new</p>'")
    acted = await eyes.act({"op": "click", "ref": ref})
    assert acted.error is None
    assert await page.evaluate("clicked") == "Pay"
    assert acted.healed == (Healed(ref, 'button "Pay", page.get_by_role("button", name="Pay")'),)
    assert f"healed: {ref} was gone or changed; the only element of its role" in outside(report(acted))
    assert f'healed {ref}: button "Pay", page.get_by_role(' in inside(report(acted))


@pytest.mark.parametrize(
    ("after", "count"), [("<button>Pay</button><button>Pay</button>", "2"), ("<button>Pay 20</button>", "no")]
)
async def test_a_stale_ref_that_none_or_several_fit_is_an_error_with_what_changed(
    page: Page, after: str, count: str
) -> None:
    eyes = await look_at(page, "<button>Pay</button>")
    ref = eyes.ref("Pay")
    await page.evaluate("html => { document.body.innerHTML = html; onclick = () => { clicked = 1 } }", after)
    started = time.perf_counter()
    acted = await eyes.act({"op": "click", "ref": ref})
    assert isinstance(acted.error, StaleRef)
    assert f"ref {ref} is gone or changed, and {count} elements have its role" in outside(str(acted.error))
    assert f'ref {ref} was button "Pay"' in inside(str(acted.error))
    assert '- button "Pay' in str(acted.error)
    assert time.perf_counter() - started < 4, "a stale ref was waited for"
    assert await page.evaluate("typeof clicked") == "undefined"


async def test_an_element_that_became_another_row_is_not_acted_on(page: Page) -> None:
    rows = (
        "<button onclick='hit.push(textContent)'>Delete Ann</button><button onclick='hit.push(textContent)'>Delete Bob"
    )
    eyes = await look_at(page, rows + "</button><script>hit = []</script>")
    ann, bob = eyes.ref("Delete Ann"), eyes.ref("Delete Bob")
    await page.evaluate(
        "[...document.querySelectorAll('button')].forEach((b, i) => { b.textContent = ['Delete Bob', 'Delete Cy'][i] })"
    )
    acted = await eyes.act({"op": "click", "ref": bob}, {"op": "click", "ref": ann})
    assert await page.evaluate("hit") == ["Delete Bob"]
    assert isinstance(acted.error, StaleRef)
    assert len(acted.healed) == 1


async def test_a_ref_that_no_look_held_is_stale(page: Page) -> None:
    eyes = await look_at(page, "<button>Pay</button>")
    for ref in ("e99", "f9e1"):
        acted = await eyes.act({"op": "click", "ref": ref})
        assert isinstance(acted.error, StaleRef)
        assert f"ref {ref} is not on the page" in str(acted.error)


async def test_what_a_click_fetches_is_waited_for(page: Page) -> None:
    html = "<button onclick=\"fetch('/held').then(() => { out.textContent = 'Thanks' })\">Pay</button><p id=out>"
    async with served() as site:
        site.pages[""] = html
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()

        def sent(request: Request) -> None:
            if request.url.endswith("/held"):
                asyncio.get_running_loop().call_later(0.15, site.release.set)

        page.on("request", sent)
        acted = await eyes.act({"op": "click", "ref": eyes.ref("Pay")})
    assert "Thanks" in acted.difference
    assert acted.settled


async def test_an_animation_is_not_waited_for_but_a_page_that_never_rests_for_a_second(page: Page) -> None:
    moving = (
        "<button>Pay</button><p id=p>x</p><script>move = () => { %s; requestAnimationFrame(move) }; move()</script>"
    )
    eyes = await look_at(page, moving % "p.style.left = performance.now() + 'px'")
    assert (await eyes.act({"op": "hover", "ref": eyes.ref("Pay")})).settled
    eyes = await look_at(page, moving % "p.textContent = performance.now()")
    acted = await eyes.act({"op": "hover", "ref": eyes.ref("Pay")})
    assert not acted.settled
    assert 1000 < acted.ms < 4000
    assert "has not come to rest" in report(acted)


async def test_a_popup_is_reported_and_recorded(page: Page) -> None:
    async with served() as site:
        site.pages[""] = "<a href=/help target=_blank>Help</a>"
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()
        acted = await eyes.act({"op": "click", "ref": eyes.ref("Help")})
        assert acted.opened == (Opened("popup", f"{site.url}/help"),)
        assert acted.navigated is None
        assert "async with page.expect_popup() as opening:\n    await page.get_by_role" in acted.python[0]
        before = len(page.context.pages)
        await run_python(acted, page)
        assert len(page.context.pages) == before + 1


async def test_a_download_is_reported_and_recorded(page: Page) -> None:
    async with served() as site:
        site.pages[""] = "<a href=/file>Report</a>"
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()
        acted = await eyes.act({"op": "click", "ref": eyes.ref("Report")})
        assert acted.opened == (Opened("download", f"from {site.url}/file", '"report.csv"'),)
        await run_python(acted, page)


ASKING = """<button onclick="out.textContent = prompt('Who?', 'x')">Ask</button>
<button onclick="out.textContent = confirm('Sure?\u202e ')">Sure</button><p id=out></p>"""


@pytest.mark.parametrize(
    ("answer", "button", "shown", "outcome"),
    [
        (None, "Sure", "false", ("confirm dismissed", '"Sure? "')),
        ("dismiss", "Sure", "false", ("confirm dismissed", '"Sure? "')),
        ("accept", "Sure", "true", ("confirm accepted", '"Sure? "')),
        ("Ann", "Ask", "Ann", ("prompt accepted", '"Who?"')),
    ],
)
async def test_a_dialog_is_answered_as_was_said_and_never_left_open(
    page: Page, answer: str | None, button: str, shown: str, outcome: tuple[str, str]
) -> None:
    eyes = await look_at(page, ASKING)
    given = [] if answer is None else [{"op": "dialog", "value": answer}]
    acted = await eyes.act(*given, {"op": "click", "ref": eyes.ref(button)})
    assert acted.error is None
    assert acted.opened == (Opened("dialog", *outcome),)
    assert await page.locator("#out").text_content() == shown
    await page.set_content(ASKING)
    await run_python(acted, page)
    assert await page.locator("#out").text_content() == shown


async def test_an_answer_that_no_dialog_took_is_said(page: Page) -> None:
    eyes = await look_at(page, "<button>Pay</button>")
    acted = await eyes.act({"op": "dialog", "value": "accept"}, {"op": "click", "ref": eyes.ref("Pay")})
    assert acted.difference.startswith("[No dialog opened")


async def test_a_page_that_asks_before_it_is_left_is_left(page: Page) -> None:
    async with served() as site:
        await page.goto(site.url)
        await page.evaluate("addEventListener('beforeunload', event => event.preventDefault())")
        await page.locator("body").click()
        acted = await Eyes(page).act({"op": "navigate", "value": "/next"})
        assert acted.error is None
        assert acted.navigated == f"{site.url}/next"
        assert [one.text for one in acted.opened] == ["beforeunload accepted"]


async def test_navigating_and_going_back(page: Page) -> None:
    async with served() as site:
        eyes = Eyes(page)
        acted = await eyes.act({"op": "back"})
        assert "no page before this one" in str(acted.error)
        acted = await eyes.act(
            {"op": "navigate", "value": f"{site.url}/one"}, {"op": "navigate", "value": "/two"}, {"op": "back"}
        )
        assert acted.navigated == f"{site.url}/one"
        assert acted.python == (
            f'await page.goto("{site.url}/one")',
            f'await page.goto("{site.url}/two")',
            "await page.go_back()",
        )
        acted = await eyes.act({"op": "navigate", "value": "http://127.0.0.1:1/"})
        assert "ERR_UNSAFE_PORT" in str(acted.error)


async def test_a_server_that_never_answers_ends_the_call_and_the_page_can_go_elsewhere(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ANSWER_SECONDS", 0.3)
    async with served() as site:
        site.pages[""] = "<a href=/hang>Go</a>"
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()
        acted = await eyes.act({"op": "click", "ref": eyes.ref("Go")})
        assert acted.error is None
        assert not acted.settled
        assert "server has not answered yet" in acted.difference
        assert acted.ms < 4000
        acted = await eyes.act({"op": "navigate", "value": "/next"})
        assert acted.navigated == f"{site.url}/next"


async def test_a_page_that_never_finishes_loading_is_taken_as_it_is(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ARRIVE_SECONDS", 0.3)
    async with served() as site:
        site.pages |= {"": "<a href=/endless>Go</a>", "endless": "<h1>Begun</h1>" + " " * 5000}
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()
        acted = await eyes.act({"op": "click", "ref": eyes.ref("Go")})
        assert (acted.error, acted.settled, acted.navigated) == (None, False, f"{site.url}/endless")
        assert "Begun" in acted.difference
        acted = await eyes.act({"op": "navigate", "value": "/endless"})
        assert acted.error is None
        assert "Begun" in acted.difference


async def test_a_script_without_end_is_stopped_and_the_page_lives(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ACTION_SECONDS", 2)
    monkeypatch.setattr(engine, "REVIVE_SECONDS", 0.3)
    eyes = await look_at(page, "<button onclick='while (true);'>Spin</button><button>Pay</button>")
    acted = await eyes.act({"op": "click", "ref": eyes.ref("Spin")}, {"op": "click", "ref": eyes.ref("Pay")})
    assert isinstance(acted.error, ActionFailed)
    assert "A script of the page ran without end and was stopped." in acted.difference
    assert '- button "Pay"' in acted.difference
    assert (await eyes.act({"op": "click", "ref": eyes.ref("Pay")})).error is None


async def test_frames_and_shadow_roots_are_acted_in_and_healed(page: Page) -> None:
    inner = "<button onclick=\"this.textContent = 'Done'\">In</button>"
    async with served() as site:
        other = site.url.replace("127.0.0.1", "localhost")
        shadow = "<div id=host></div><script>host.attachShadow({mode: 'open'}).innerHTML = '<button>Deep</button>'"
        site.pages |= {"": f"<iframe src={other}/inner></iframe>{shadow}</script>", "inner": inner}
        await page.goto(site.url)
        eyes = Eyes(page)
        await eyes()
        framed, deep = eyes.ref("In"), eyes.ref("Deep")
        await page.frames[1].evaluate("document.body.innerHTML += ''")
        await page.evaluate("host.shadowRoot.firstChild.onclick = () => { deep = 1 }")
        acted = await eyes.act({"op": "click", "ref": framed}, {"op": "click", "ref": deep})
        assert acted.error is None
        assert len(acted.healed) == 1
        assert '- button "Done"' in acted.difference
        assert await page.evaluate("deep") == 1
        assert acted.python[0] == 'await page.locator("iframe").content_frame.get_by_role("button", name="In").click()'
        await page.reload()
        await run_python(acted, page)
        assert await page.frames[1].locator("button").text_content() == "Done"


async def test_waiting_for_texts_and_elements(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    html = "<p hidden>Ready</p><p id=busy>Busy</p><button onclick='setTimeout(go, 200)'>Go</button>"
    eyes = await look_at(page, html + "<script>go = () => { busy.outerHTML = '<p>Ready</p>' }</script>")
    acted = await eyes.act(
        {"op": "click", "ref": eyes.ref("Go")},
        {"op": "wait", "value": "Ready"},
        {"op": "wait", "locator": "#busy", "value": "hidden"},
        {"op": "wait", "ref": eyes.ref("Go")},
        {"op": "wait", "ref": "e99", "value": "detached"},
    )
    assert acted.error is None
    assert acted.python[-1] == "# e99 was detached already"
    ast.parse("\n".join(f"async def f():\n  {line}\n  pass" for line in acted.python))
    monkeypatch.setitem(engine.PATIENT_SECONDS, "wait", 0.3)
    acted = await eyes.act({"op": "wait", "value": "Never"})
    assert re.search(r"actions\[0\], wait: Timeout [1-3]\d\dms", str(acted.error)), acted.error


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "secret.txt").write_text("no")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    return folder


async def test_files_of_an_allowed_folder_are_uploaded_also_through_a_button(page: Page, folder: Path) -> None:
    html = "<input type=file id=f multiple aria-label=Files><button onclick=g.click()>Pick</button>"
    html += "<input type=file id=g hidden>"
    names = "['f', 'g'].map(id => [...document.getElementById(id).files].map(file => file.name))"
    eyes = await look_at(page, html)
    acted = await eyes.act(
        {"op": "upload", "ref": eyes.ref("Files"), "value": ["a.txt", str(folder / "b.txt")]},
        {"op": "upload", "ref": eyes.ref("Pick"), "value": "a.txt"},
        folders=[folder],
    )
    assert acted.error is None
    assert await page.evaluate(names) == [["a.txt", "b.txt"], ["a.txt"]]
    await page.set_content(html)
    await run_python(acted, page)
    assert await page.evaluate(names) == [["a.txt", "b.txt"], ["a.txt"]]


@pytest.mark.parametrize("path", ["../secret.txt", "out.txt", "/etc/hostname", "none.txt", ".", "a\0b"])
def test_no_other_file_is_uploaded(folder: Path, path: str) -> None:
    with pytest.raises(InvalidInput, match=r"actions\[0\]\.value"):
        checked([{"op": "upload", "ref": "e1", "value": path}], [folder])
    assert checked([{"op": "upload", "ref": "e1", "value": "a.txt"}], [folder])


async def test_secret_values_are_recorded_by_name_or_hidden_and_never_echoed(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ACTION_SECONDS", 2)
    html = "<label>Password <input type=password id=p></label><label>Code <input type=password id=c disabled></label>"
    eyes = await look_at(page, html + "<button onclick='confirm(p.value)'>Show</button><input id=t aria-label=Token>")

    def mask(text: str) -> str:
        return text.replace("tok-123456", "[secret api]")

    acted = await eyes.act(
        {"op": "fill", "ref": eyes.ref("Token"), "value": "tok-123456"},
        {"op": "fill", "ref": eyes.ref("Password"), "value": "hunter22"},
        {"op": "click", "ref": eyes.ref("Show")},
        {"op": "press", "ref": eyes.ref("Password"), "value": "7"},
        {"op": "fill", "ref": eyes.ref("Code"), "value": "918"},
        mask=mask,
    )
    assert acted.python[0].endswith('.fill(flow.secret("api"))')
    assert acted.python[1] == f'await page.get_by_role("textbox", name="Password").fill("{HIDDEN}")'
    assert acted.python[3].endswith(f'.press("{HIDDEN}")')
    assert acted.opened == (Opened("dialog", "confirm dismissed", f'"{HIDDEN}"'),)
    assert acted.error is not None
    told = str(acted.error).replace(acted.difference, "")
    assert not [secret for secret in ("tok-123456", "hunter22", "918") if secret in told]
    assert await page.locator("#t").input_value() == "tok-123456"


async def test_closing_the_page_ends_the_call(page: Page) -> None:
    eyes = await look_at(page, "<button onclick='close()'>Bye</button>")
    acted = await eyes.act({"op": "close"})
    assert acted.error is None
    assert page.is_closed()
    assert "page is closed" in acted.difference
    with pytest.raises(PageGone):
        await eyes.act({"op": "back"})


async def test_acting_leaves_the_requested_pause_to_the_workflow(page: Page) -> None:
    eyes = await look_at(page, "<button>Buy</button>")
    debugger, paused = page.context.debugger, asyncio.Event()
    debugger.on("pausedstatechanged", lambda *_: paused.set())
    await debugger.request_pause()
    async with asyncio.timeout(8):
        assert (await eyes.act({"op": "click", "ref": eyes.ref("Buy")})).error is None
        assert debugger.paused_details is None
        click = asyncio.ensure_future(page.get_by_role("button").click())
        await paused.wait()
        assert (await eyes.act({"op": "click", "ref": eyes.ref("Buy")})).error is None
        await debugger.resume()
        await click


async def test_calls_to_one_page_queue_over_all_connections(page: Page, browser: Browser) -> None:
    eyes = await look_at(page, "<button onclick='n++'>Add</button><script>n = 0</script>")
    await page.evaluate("location.hash = 'same'")
    same = next(other for context in browser.contexts for other in context.pages if other.url.endswith("#same"))
    add = [{"op": "click", "ref": eyes.ref("Add")}] * 3
    acted, *values = await asyncio.gather(eyes.act(*add), *(evaluate(same, "n") for _ in range(3)))
    assert acted.error is None
    assert [value.value for value in values] == [3, 3, 3]


async def test_a_click_on_a_quiet_page_is_answered_soon(page: Page) -> None:
    eyes = await look_at(page, "<button onclick='n++'>Add</button><script>n = 0</script>" + "<p>text</p>" * 50)
    ours, raw = [], []
    for _ in range(5):
        ours.append((await eyes.act({"op": "click", "ref": eyes.ref("Add")})).ms)
        started = time.perf_counter()
        await page.get_by_role("button").click()
        raw.append((time.perf_counter() - started) * 1000)
    print(f"act: {min(ours):.0f} ms at best, raw click: {min(raw):.0f} ms")
    # The aim is 200 ms; `make bench` has the figure. A machine busy with other things is no failure.
    assert min(ours) < 10 * max(50, min(raw))
