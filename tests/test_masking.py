"""Nothing secret is written down: a run that used secrets, failed, was looked at and acted on, and then its folder."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from clients import call, refusal, stop, text
from mcp import Client

from mcp_flow import config, presence
from mcp_flow.config import Settings
from mcp_flow.errors import StepError
from mcp_flow.failures import untyped
from mcp_flow.secrets import Secrets
from mcp_flow.server import build

pytestmark = pytest.mark.anyio

TOKEN = "s3cr3t-token-42"
UNASKED = "never-asked-for-7"
PASSWORD = "hunter2hunter2"
CARD = "4111 1111 1111 1111"
SECRETS = (TOKEN, UNASKED, PASSWORD, CARD)

# Its source is kept, so that it makes up its secrets.
WORKFLOWS = r'''
import asyncio
from mcp_flow import Flow, workflow

PASSWORD = "hunter2" * 2
CARD = " ".join(["4111", *["1111"] * 3])
BOX = "position: fixed; left: {}px; top: 0; width: 80px; height: 40px; margin: 0; border: 0"
FORM = f"""<title>Shop</title><p id=said style="margin-top: 200px"></p>
<input id=q style="{BOX.format(400)}" value=plain>
<input id=pw type=password style="{BOX.format(0)}"><input id=off type=password disabled style="top: 90px">
<iframe style="{BOX.format(200)}" srcdoc="<body style='margin: 0'>
<input type=password value=framed-pass-1 style='{BOX.format(0)}'>"></iframe>
<button onclick="pw.type = 'text'; q.value = pw.value">show</button>"""


@workflow
async def shop(flow: Flow) -> str:
    page = await flow.page()

    async def sign_in():
        await page.set_content(FORM)
        token, kept = flow.secret("shop"), "-".join(["never", "asked", "for", "7"])
        await page.evaluate("text => said.textContent = text", f"token {token}, {kept}, card {CARD}")

    async def pay():
        await page.fill("#pw", PASSWORD)
        await page.evaluate("alert('you typed ' + pw.value)")

        async def forgotten():
            raise ValueError(f"{await page.input_value('#pw')} {await page.inner_text('#said')}")

        task = asyncio.create_task(forgotten())
        await asyncio.wait([task])
        del task
        raise ValueError(f"{await page.input_value('#pw')}; {await page.inner_text('#said')}")

    async def fill():
        await page.fill("#off", PASSWORD, timeout=300)

    await flow.step("sign in", sign_in)
    await flow.step("fill", fill, on_fail="continue")
    await flow.step("pay", pay)
    return "paid"
'''


@pytest.fixture(scope="module")
async def settings(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    folder = tmp_path_factory.mktemp("masking")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(WORKFLOWS)
    settings = config.load(home=folder / "home", workflows=folder / "workflows")
    config.private_folder(settings.home)
    secrets = settings.home / "secrets.toml"
    secrets.touch(0o600)
    secrets.write_text(f'bank = "{UNASKED}"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCP_FLOW_SECRET_SHOP", TOKEN)
        yield settings
        await stop(settings)


@pytest.fixture(scope="module")
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with Client(build(settings)) as client:
        yield client


async def colours(client: Client, run_id: str, picture: Path, *places: int) -> list[list[int]]:
    """The colours of a kept picture at these distances from its left."""
    code = """const image = new Image(); image.src = 'data:image/png;base64,%s'; await image.decode();
        const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
        canvas.drawImage(image, 0, 0);
        return %s.map(x => [...canvas.getImageData(x, 20, 1, 1).data].slice(0, 3));"""
    encoded = base64.b64encode(await anyio.Path(picture).read_bytes()).decode()
    seen = await call(client, "exec_js", run_id=run_id, mode="write", code=code % (encoded, list(places)))
    return list(seen["value"])


def files_with(settings: Settings, *secrets: str) -> list[tuple[str, str]]:
    """Which files below the home folder hold which secret, the one that is there to hold one aside."""
    files = [path for path in settings.home.rglob("*") if path.is_file() and path.name != "secrets.toml"]
    assert {"flow.db", "worker.log", "host.log"} <= {path.name for path in files}
    return [(path.name, one) for path in files for one in secrets if one.encode() in path.read_bytes()]


async def test_a_run_that_used_secrets_leaves_none_of_them_behind_whatever_was_done_with_it(
    client: Client, settings: Settings
) -> None:
    run = await call(client, "start_run", workflow="shop", wait_s=40)
    run_id, told = run["run_id"], []
    assert run["status"] == "failed"
    said = "[hidden]; token [secret shop], [secret bank], card [hidden]"
    assert run["error"]["message"] == said

    # The step that asked for the secret is not run again, and another process has never heard of it.
    await anyio.to_thread.run_sync(presence.stop_workers, settings)
    run = await call(client, "resume", run_id=run_id, wait_s=40)
    assert (run["status"], run["error"]["message"]) == ("failed", said)
    folder = Path(run["folder"])
    assert "token [hidden], [hidden], card [hidden]" in (folder / "failure-2.txt").read_text()

    pink, white = [255, 0, 255], [255, 255, 255]
    told.append(await text(client, "snapshot", run_id=run_id, mode="full"))
    told.append(await refusal(client, "exec_js", run_id=run_id, code="throw new Error(pw.value + said.textContent)"))
    code = f"pw.value = '{PASSWORD}'; console.log(pw.value, '{CARD}'); return [pw.value, said.textContent, '{TOKEN}']"
    told.append(str(await call(client, "exec_js", run_id=run_id, mode="write", code=code)))
    code = f"pw.value = '{PASSWORD}'; throw new Error('{PASSWORD}')"
    told.append(await refusal(client, "exec_js", run_id=run_id, mode="write", code=code))
    fill = {"op": "fill", "locator": "#pw", "value": PASSWORD}
    told.append(await text(client, "act", run_id=run_id, actions=[fill, {"op": "click", "locator": "button"}, fill]))
    told.append(str(await call(client, "exec_js", run_id=run_id, code="[pw.type, pw.value, q.value]")))
    assert "'value': ['text', '[hidden]', '[hidden]']" in told[-1]
    assert await colours(client, run_id, folder / "failure-2.png", 40, 240, 440) == [pink, pink, white]

    run = await call(client, "resume", run_id=run_id, rerun=["pay"], wait_s=40)
    assert await colours(client, run_id, folder / "failure-3.png", 40, 240) == [pink, pink], "shown in clear by now"
    view = await call(client, "get_run", run_id=run_id, since=0, limit=500)
    told.append(str(view))

    events: list[dict[str, Any]] = view["events"]
    dialogs = [event["details"]["message"] for event in events if event["type"] == "page.observed"]
    assert dialogs == ["you typed [hidden]"] * 3
    evaluated = [event["code"] for event in events if event["type"] == "page.evaluated"]
    assert "pw.value = '[hidden]'; throw new Error('[hidden]')" in evaluated
    assert any("return [pw.value, said.textContent, '[hidden]']" in code for code in evaluated)
    assert "ValueError: [not logged]" in (settings.home / "logs" / "worker.log").read_text()
    assert [(one, answer) for answer in told for one in SECRETS if one in answer] == []
    assert files_with(settings, *SECRETS) == []


LOG = """Page.fill: Timeout 300ms exceeded.
Call log:
  - waiting for locator("#pw")
    - %s
  - attempting fill action
    2 \u00d7 waiting for element to be visible
"""


@pytest.mark.parametrize("typed", ["secret", 'with "quotes" and ")', "two\nlines", 'fill("twice")', "", "- 2 \u00d7 "])
@pytest.mark.parametrize("action", ["fill", "elementHandle.type", "elementHandle.press"])
def test_what_was_typed_does_not_stand_in_the_log_of_an_action(action: str, typed: str) -> None:
    assert untyped(LOG % f'{action}("{typed}")') == LOG % f'{action}("…")'
    assert untyped(f'- {action}("{typed}")') == f'- {action}("…")'
    assert untyped(f"no log: {typed.removeprefix('fill')}") == f"no log: {typed.removeprefix('fill')}"


def test_what_was_not_asked_for_is_masked_and_only_in_the_way_where_it_can_not_be_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets.toml").write_text('user = "main"\nshop = "other-value"\n')
    (tmp_path / "secrets.toml").chmod(0o644)
    for name, value in (("SHOP", "long-enough"), ("TINY", "abc"), ("AS_USER", "main")):
        monkeypatch.setenv(f"MCP_FLOW_SECRET_{name}", value)
    secrets = Secrets(tmp_path)
    assert secrets.mask("main long-enough") == "main long-enough"
    secrets.learn()
    assert secrets.mask("main long-enough other-value abc abcd") == (
        "[secret as_user] [secret shop] [secret shop in secrets.toml] [secret tiny] abcd"
    )
    assert secrets.held_in(b"main") == []
    assert secrets.held_in(b"a long-enough one") == ["shop"]
    assert secrets.held_in_json('["main", "long-enough"]') == ["shop"]
    assert secrets.get("as_user") == "main"
    assert secrets.held_in(b"main") == ["as_user"]
    assert secrets.held_in_json('["main"]') == ["as_user"]
    with pytest.raises(StepError, match="chmod 600"):
        secrets.get("user")
    (tmp_path / "secrets.toml").write_text("no toml")
    assert "user" not in Secrets(tmp_path).values()
