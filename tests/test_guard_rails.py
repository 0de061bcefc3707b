"""Pages reach what they may and nothing else, whichever way they ask; and whoever is refused is told how to go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import pytest
from browsing import look
from clients import refusal, text
from harness import House, open_house
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.browser.driver import Driver
from mcp_flow.errors import BrokenWorkflow
from mcp_flow.server import build

pytestmark = pytest.mark.anyio


class Site:
    """Says "hello" everywhere; `/to/<url>` leads on to that URL."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.asked.append(self.path)
                onward = self.path.partition("/to/")[2]
                self.send_response(302 if onward else 200)
                if onward:
                    self.send_header("location", onward)
                self.send_header("content-type", "text/html")
                self.send_header("access-control-allow-origin", "*")
                self.send_header("content-length", "5")
                self.end_headers()
                self.wfile.write(b"hello")

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def served(self) -> Iterator[Site]:
        """Answers as long as this is open."""
        with self._server as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield self
            server.shutdown()


@pytest.fixture
def named() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture
def other() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("rails")
    (folder / "files").mkdir()
    options = {"allow_origins": (), "block_origins": ("*.blocked.example",), "files": folder / "files", "grace": 0.5}
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows", **options)) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    shared.begin(request.node.name)
    yield shared
    await shared.tidy()


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


@pytest.fixture(scope="module")
async def client(shared: House) -> AsyncIterator[Client]:
    async with Client(build(shared.settings)) as client:
        yield client


VISIT = """
    @workflow(allow_origins=["{allow}"])
    async def main(flow: Flow, url: str) -> str:
        page = await flow.page()
        await flow.step("open", page.goto, url)
        return await flow.step("read", page.inner_text, "body")
    """
PAUSED = """
    @workflow(allow_origins=["{allow}"])
    async def main(flow: Flow, url: str) -> str:
        page = await flow.page()
        await flow.step("open", page.goto, url)
        await flow.pause("look")
        return await flow.step("read", page.inner_text, "body")
    """


async def test_a_private_address_is_refused_until_the_code_names_it_and_then_reached_in_the_same_page(
    house: House, named: Site
) -> None:
    run_id = await house.start(VISIT.format(allow="*"), {"url": named.url})
    failed = await house.until(run_id, "failed")
    assert failed.error
    assert f"127.0.0.1:{named.port} is a private address" in failed.error.message
    assert f'@workflow(allow_origins=["127.0.0.1:{named.port}"])' in failed.error.message
    assert failed.error.step == "open"
    assert named.asked == []
    pages = list(failed.pages.values())
    house.edit('["*"]', f'["127.0.0.1:{named.port}"]')
    await house.resume(run_id)
    assert await house.finished(run_id) == "hello"
    assert [event.target_id for event in await house.events(run_id, ev.PageOpened)] == pages


async def test_a_redirect_to_what_may_not_be_reached_ends_there(house: House, named: Site, other: Site) -> None:
    run_id = await house.start(VISIT.format(allow=named.url), {"url": f"{named.url}/to/{other.url}"})
    failed = await house.until(run_id, "failed")
    assert failed.error
    assert f"127.0.0.1:{other.port} is not among allow_origins" in failed.error.message
    assert (len(named.asked), other.asked) == (1, [])


WAYS = {
    "fetch": "fetch(there)",
    "image": "new Promise((done, no) => Object.assign(new Image(), {onload: done, onerror: no, src: there}))",
    "frame": """new Promise((done, no) => {
        const frame = document.body.appendChild(document.createElement('iframe'));
        frame.onload = () => { try { frame.contentDocument.body; done(); } catch { no('another origin'); } };
        frame.src = there;
    })""",
    "socket": """new Promise((done, no) => {
        Object.assign(new WebSocket(there.replace('http', 'ws')), {onopen: done, onerror: no});
    })""",
    "worker": """new Promise((done, no) => {
        const code = `fetch('${there}').then(() => postMessage(1), () => postMessage(0))`;
        new Worker(URL.createObjectURL(new Blob([code]))).onmessage = told => told.data ? done() : no();
    })""",
    "redirect": "fetch('/to/' + there)",
    "beacon": "new Promise((done, no) => { navigator.sendBeacon(there); setTimeout(no, 100); })",
}


async def test_no_way_leads_a_page_elsewhere_not_even_while_nobody_is_attached_to_it(
    house: House, driver: Driver, named: Site, other: Site
) -> None:
    run_id = await house.start(PAUSED.format(allow=named.url), {"url": named.url})
    await house.waiting(run_id, "paused")
    ways = ",".join(f"{name}: () => {way}" for name, way in WAYS.items())
    script = f"""async () => {{
        const there = {f"{other.url}/reached"!r}, ways = {{{ways}}}, found = {{}};
        for (const name in ways) found[name] = await ways[name]().then(() => 'reached', () => 'refused');
        return found;
    }}"""
    assert await look(driver, house, run_id, script) == dict.fromkeys(WAYS, "refused")
    await house.stop_working()
    assert await look(driver, house, run_id, script) == dict.fromkeys(WAYS, "refused")
    assert other.asked == []
    assert await look(driver, house, run_id, "fetch('/again').then(answer => answer.text())") == "hello"
    await house.resume(run_id)
    await house.finished(run_id)
    [told] = [event.details for event in await house.events(run_id, ev.PageObserved) if event.what == "not-reached"]
    assert told["url"].startswith(other.url)
    assert "is not among allow_origins" in told["why"]


async def test_what_the_settings_block_is_refused_whatever_a_workflow_names(house: House) -> None:
    run_id = await house.start(VISIT.format(allow="*.blocked.example"), {"url": "http://shop.blocked.example/"})
    failed = await house.until(run_id, "failed")
    assert failed.error
    assert "shop.blocked.example:80 is refused by block_origins (*.blocked.example)" in failed.error.message


async def test_a_host_that_can_not_be_reached_is_told_from_one_that_may_not(house: House) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    run_id = await house.start(VISIT.format(allow="127.0.0.1"), {"url": f"http://127.0.0.1:{port}/"})
    failed = await house.until(run_id, "failed")
    assert failed.error
    assert f"127.0.0.1:{port} could not be reached: it refused the connection." in failed.error.message
    house.edit('["127.0.0.1"]', '["*"]')
    run_id = await house.again({"url": "http://nowhere.invalid/"})
    failed = await house.until(run_id, "failed")
    assert failed.error
    assert "nowhere.invalid could not be reached: its name could not be resolved." in failed.error.message


async def test_files_of_the_machine_are_refused_to_pages(house: House, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("for nobody")
    for prefix in ("", "view-source:"):
        run_id = await house.start(VISIT.format(allow="*"), {"url": f"{prefix}file://{tmp_path}/secret.txt"})
        failed = await house.until(run_id, "failed")
        assert failed.error
        assert "file: URLs are refused to pages" in failed.error.message


async def test_an_agent_s_own_actions_keep_to_the_rails_and_its_files_come_from_the_named_folder(
    house: House, client: Client, named: Site, other: Site, tmp_path: Path
) -> None:
    run_id = await house.start(PAUSED.format(allow=named.url), {"url": named.url})
    await house.waiting(run_id, "paused")

    def to(url: str) -> list[dict[str, str]]:
        return [{"op": "navigate", "value": url}]

    refused = await refusal(client, "act", run_id=run_id, actions=to(f"{other.url}/secret"))
    assert f"127.0.0.1:{other.port} is not among allow_origins" in refused
    assert other.asked == []
    await text(client, "act", run_id=run_id, actions=to(named.url))
    code = "document.body.innerHTML = '<input type=file>'"
    await client.call_tool("exec_js", {"run_id": run_id, "mode": "write", "code": code})
    assert house.settings.files
    (house.settings.files / "mine.txt").write_text("mine")
    (tmp_path / "other.txt").write_text("not mine")

    def upload(path: Path) -> list[dict[str, str]]:
        return [{"op": "upload", "locator": "input", "value": str(path)}]

    for elsewhere in (tmp_path / "other.txt", house.settings.files / ".." / "home" / "flow.db"):
        assert "no such file in a folder from which uploads are allowed" in await refusal(
            client, "act", run_id=run_id, actions=upload(elsewhere)
        )
    assert "done in" in await text(client, "act", run_id=run_id, actions=upload(house.settings.files / "mine.txt"))
    chosen = await client.call_tool(
        "exec_js", {"run_id": run_id, "code": "document.querySelector('input').files[0].name"}
    )
    assert "mine.txt" in chosen.content[0].text


async def test_a_pattern_that_is_none_breaks_its_file_and_says_so(house: House) -> None:
    with pytest.raises(BrokenWorkflow, match=r"allow_origins: 'shop.example/cart' is no origin"):
        await house.start(VISIT.format(allow="shop.example/cart"), {"url": "about:blank"})


async def test_the_proxy_of_the_environment_is_gone_through(
    tmp_path: Path, named: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        beyond, onward = await asyncio.open_connection("127.0.0.1", named.port)

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                sink.write(data)
            sink.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(carry(reader, onward), carry(beyond, writer))

    proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    monkeypatch.setenv("no_proxy", "")
    made = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows", allow_origins=())
    async with open_house(made) as house:
        house.begin("proxied")
        run_id = await house.start(VISIT.format(allow="*"), {"url": "http://shop.invalid/"})
        with anyio.fail_after(30):
            assert await house.finished(run_id) == "hello"
    proxy.close()
    assert "CONNECT shop.invalid:80 HTTP/1.1" in asked
