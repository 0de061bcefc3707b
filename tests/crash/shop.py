"""The workflow of the crash matrix, the site on which it acts, and the agent that sees a run of it to its end.

Every effect is counted outside of the journal: when a step begins in a file, when it has had its effect on the site.
"""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from clients import call
from mcp import Client

from mcp_flow.attempt import START_DELAY

WORKFLOW = '''
import asyncio, urllib.parse, urllib.request
from pathlib import Path
from mcp_flow import Flow, workflow


def begin(trace, what):
    with open(trace, "a") as file:
        file.write(f"{what}\\n")


def post(site, what, run_id):
    request = urllib.request.Request(f"{site}/{what}?run={run_id}", b"")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def effect(trace, site, what, run_id):
    begin(trace, what)
    return post(site, what, run_id)


async def in_the_loop(*arguments):
    return await asyncio.to_thread(effect, *arguments)


async def in_the_page(page, trace, what, run_id):
    begin(trace, what)
    return await page.evaluate(POST, f"/{what}?run={run_id}")


async def fill(page, trace, run_id):
    await page.fill("#name", "Ada")
    await page.evaluate("window.half = 42; document.cookie = 'cart=half'")
    return await in_the_page(page, trace, "fill", run_id)


POST = "path => fetch(path, {method: 'POST'}).then(answer => answer.text())"
LOOK = """[location.pathname, document.cookie.split('; ').sort(), document.querySelector('#name').value,
    window.half ?? null]"""


@workflow
async def order(flow: Flow, site: str, trace: str, paged: bool) -> dict:
    """Order tea."""
    at, token = await flow.now(), await flow.uuid()
    await flow.log("begun")
    weighed = await flow.step("weigh", effect, trace, site, "weigh", flow.run_id)
    if paged:
        page = await flow.page()
        await flow.step("open", page.goto, f"{site}/shop")
        await flow.step("sign-in", in_the_page, page, trace, "sign-in", flow.run_id, restore=True)
        await flow.step("cart", page.goto, f"{site}/cart")
        await flow.step("fill", fill, page, trace, flow.run_id)
    tea = await flow.ask("Which tea?", str)
    await flow.step("wrap", in_the_loop, trace, site, "wrap", flow.run_id)
    await flow.step("frail", effect, trace, site, "frail", flow.run_id)
    await flow.progress(1, 2, "wrapped")
    await flow.approve("Pay?", data={"tea": tea})
    number = await flow.step("pay", effect, trace, site, "pay", flow.run_id, once=True)
    await flow.attach("receipt.txt", number.encode())
    seen = await flow.step("look", page.evaluate, LOOK) if paged else None
    await flow.step("tell", effect, trace, site, "tell", flow.run_id)
    return {"at": at.isoformat(), "token": str(token), "weighed": weighed, "tea": tea, "number": number, "seen": seen}
'''

PAGE = "<!doctype html><title>{path}</title><input id=name>"
TEA = "oolong"
SLOW = "wrap"
"""What the site takes so long for that the start of the step is written before its end."""

Note = Callable[[str, dict[str, Any]], None]


class Site:
    """Counts what is posted: to each path by each run. `/frail` is out of order until the run's `/mend`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.counts: dict[str, Counter[str]] = {}

    def posted(self, run_id: str) -> Counter[str]:
        """How often each effect of a run has happened."""
        return self.counts.setdefault(run_id, Counter())

    def post(self, what: str, run_id: str) -> str | None:
        """Have an effect; None where it is refused."""
        counts = self.posted(run_id)
        if what == "frail" and not counts["mend"]:
            return None
        counts[what] += 1
        return f"{what} {run_id}"


@contextlib.contextmanager
def open_site() -> Iterator[Site]:
    """A site on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, run_id = self._asked()
            paid = site.posted(run_id)["pay"] if path == "paid" else None
            self._answer(200, PAGE.format(path=path) if paid is None else f"{paid}")

        def do_POST(self) -> None:
            path, run_id = self._asked()
            if path == SLOW:
                threading.Event().wait(2 * START_DELAY)
            said = site.post(path, run_id)
            cookie = [("set-cookie", "who=ada; path=/")] if path == "sign-in" else []
            self._answer(503 if said is None else 200, said or "out of order", *cookie)

        def _asked(self) -> tuple[str, str]:
            url = urllib.parse.urlsplit(self.path)
            return url.path.strip("/"), urllib.parse.parse_qs(url.query).get("run", [""])[0]

        def _answer(self, status: int, text: str, *headers: tuple[str, str]) -> None:
            with contextlib.suppress(ConnectionError):  # whoever asked was killed
                self.send_response(status)
                for name, value in (("content-type", "text/html"), ("content-length", str(len(text))), *headers):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        site = Site(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield site
        server.shutdown()


async def attend(client: Client, run_id: str, input: dict[str, Any], note: Note = lambda *_: None) -> dict[str, Any]:
    """Do what an agent does until the run has finished: start it, answer, mend what failed, approve, look and decide.

    A failure other than the one that the workflow asks for is no condition to be mended, and fails the test.
    """

    async def move(tool: str, **arguments: Any) -> dict[str, Any]:
        note(tool, arguments)
        return await call(client, tool, **arguments)

    view = await move("start_run", workflow="order", input=input, run_id=run_id, wait_s=0)
    while view["status"] != "finished":
        pending = next(iter(view.get("pending", [])), {})
        match view["status"]:
            case "queued" | "running" | "interrupted":
                view = await call(client, "get_run", run_id=run_id, wait_s=20)
            case "waiting-input":
                view = await move("resume", run_id=run_id, request_id=pending["request_id"], value=TEA, wait_s=0)
            case "waiting-approval":
                view = await move("approve", request_id=pending["request_id"], wait_s=0)
            case "in-doubt":
                view = await move("resume", run_id=run_id, wait_s=0, **await _settle(input["site"], run_id))
            case "failed" if view["error"].get("step") == "frail":
                await anyio.to_thread.run_sync(_ask, f"{input['site']}/mend?run={run_id}", b"")
                view = await move("resume", run_id=run_id, wait_s=0)
            case _:
                raise AssertionError(json.dumps(view))
    return view


async def _settle(site: str, run_id: str) -> dict[str, Any]:
    """What somebody decides who looks whether the payment has come."""
    paid = int(await anyio.to_thread.run_sync(_ask, f"{site}/paid?run={run_id}"))
    return {"step": "done", "value": f"pay {run_id}"} if paid else {"step": "again"}


def _ask(url: str, data: bytes | None = None) -> str:
    with urllib.request.urlopen(url, data, timeout=10) as answer:
        return str(answer.read().decode())


def begun(trace: Path) -> Counter[str]:
    """How often each step of a run has begun."""
    return Counter(trace.read_text().split()) if trace.exists() else Counter()
