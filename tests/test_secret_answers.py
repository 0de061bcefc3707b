"""Secrets that people answer with: typed unseen, masked everywhere, and nowhere once the run has ended."""

from __future__ import annotations

import os
import pty
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from clients import call, refusal, text, until
from harness import AGENT, PERSON, House, open_house
from mcp import Client
from pydantic import BaseModel, SecretBytes, SecretStr

from mcp_flow import config, fingerprint
from mcp_flow import events as ev
from mcp_flow.config import Settings
from mcp_flow.errors import InvalidInput, NotAllowed, StepError
from mcp_flow.flow import shape_of
from mcp_flow.secrets import reveal, secret_places, set_apart
from mcp_flow.server import build
from mcp_flow.store import Store

WORKFLOWS = '''
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, SecretStr

from mcp_flow import Flow, Retriable, workflow


def six_digits(code: SecretStr) -> SecretStr:
    if not code.get_secret_value().isdigit():
        raise ValueError(f"{code.get_secret_value()} is no code")
    return code


class Login(BaseModel):
    user: str
    tries: int
    password: SecretStr
    pin: SecretStr | None = None
    remark: str | None = None


@workflow
async def login(flow: Flow) -> str:
    """Ask for everything that a login takes."""
    login = await flow.ask("Who are you?", Login)
    password = login.password.get_secret_value()
    await flow.log(f"the password is {password}")
    await flow.pause("signed in")
    return f"{login.user} {login.tries} {len(password)} {login.pin} {login.remark}"


@workflow
async def code(flow: Flow) -> int:
    """Ask for a code."""
    code = await flow.ask("The code?", Annotated[SecretStr, AfterValidator(six_digits)])
    return len(code.get_secret_value())


@workflow
async def boom(flow: Flow) -> str:
    """Fail with the secret in the error."""
    code = await flow.ask("The code?", SecretStr)

    def use() -> None:
        raise ValueError(f"wrong code: {code.get_secret_value()}")

    await flow.step("use", use)
    return ""


@workflow
async def tells(flow: Flow) -> str:
    """Return the secret."""
    code = await flow.ask("The code?", SecretStr)
    return await flow.step("tell", lambda: code.get_secret_value())


@workflow
async def again(flow: Flow) -> int:
    """Ask for the code once it is needed."""

    def use() -> int:
        if flow.retry_input is None:
            raise Retriable("a code is needed", ask=SecretStr)
        return len(flow.retry_input)

    return await flow.step("use", use)


@workflow
async def shows(flow: Flow) -> str:
    """Show the secret in a page."""
    code = await flow.ask("The code?", SecretStr)
    page = await flow.page()
    shown = code.get_secret_value()
    await page.set_content(f"<title>{shown}</title><p>Your code is {shown}.</p><button aria-label='{shown}'>b</button>")
    await flow.pause("look")
    return "seen"


@workflow
async def event(flow: Flow) -> str:
    """Wait for an event that brings a secret."""
    return str(await flow.wait_for("paid", SecretStr))


@workflow
async def guess(flow: Flow) -> str:
    """Ask for a secret, then for anything."""
    await flow.ask("The code?", SecretStr)
    return str(await flow.ask("Anything?", dict))


@workflow
async def keeps(flow: Flow) -> str:
    """Ask for a secret, wait for everything else, then give the secret as a default."""
    code = await flow.ask("The code?", SecretStr)
    said = await flow.ask("Anything?", str)
    paid = await flow.wait_for("paid", str)
    decision = await flow.approve("Go on?")
    await flow.pause(f"{said} {paid} {decision.note}")
    return await flow.ask("Which?", str, default=code.get_secret_value(), expires=60)


@workflow
async def short(flow: Flow) -> str:
    """Get by with a code of three digits."""
    early = await flow.step("row 739", lambda: "739 rows")
    code = (await flow.ask("The code?", SecretStr)).get_secret_value()
    await flow.log(f"the code is {code}, of 27390")
    await flow.step("count", lambda: 739)
    await flow.step("type", lambda text, number, raw: len(text), code, int(code), code.encode())
    await flow.step("send", partial(len, [{"code": code}]))
    await flow.pause("look")
    return await flow.step("tell", lambda: {"it": [f"is {code}"]})
'''
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(WORKFLOWS)
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        await house.working()
        yield house
        await house.tidy()


async def asking(house: House, workflow: str) -> tuple[str, str]:
    run_id = await house.control.start(workflow, {})
    return run_id, (await house.waiting(run_id, "waiting-input")).opened.request_id


async def answer(house: House, run_id: str, request_id: str, value: Any) -> None:
    await house.control.resume(run_id, PERSON, request_id=request_id, value=value, has_value=True)


def holding(settings: Settings, secret: str) -> set[str]:
    """The files of the home folder in which a secret stands.

    Read by another process: who closes a database's file loses the locks that SQLite holds on it in this one.
    """
    said = subprocess.run(["grep", "-rlaF", "--", secret, settings.home], capture_output=True, text=True, check=False)
    assert said.returncode in (0, 1), said.stderr
    return {Path(line).name for line in said.stdout.splitlines()}


async def at_terminal(settings: Settings, *arguments: str, typing: Sequence[tuple[str, str]] = ()) -> tuple[int, str]:
    """A command at a terminal of its own, where each text is typed once its prompt shows."""

    def run() -> tuple[int, str]:
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(settings.environment())
            os.execv(sys.executable, [sys.executable, "-m", "mcp_flow", *arguments])
        late = threading.Timer(30, os.kill, (pid, 9))
        late.start()
        shown, left = b"", list(typing)
        try:
            while part := os.read(terminal, 4096):
                shown += part
                if left and shown.endswith(left[0][0].encode()):
                    os.write(terminal, left.pop(0)[1].encode() + b"\n")
        except OSError:  # the terminal is closed with its process
            pass
        late.cancel()
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    return await anyio.to_thread.run_sync(run)


async def test_a_form_with_secrets_is_typed_at_a_terminal_and_they_are_not_shown(house: House) -> None:
    run_id, request = await asking(house, "login")
    typing = [
        ("  user ", "ann"),
        ("  tries ", "3"),
        ("  password (not shown) ", SECRET),
        ("  pin (not shown) ", "pin-of-ann"),
        ("  remark ", ""),
    ]
    status, shown = await at_terminal(house.settings, "answer", request, typing=typing)
    assert status == 0, shown
    assert "Who are you?" in shown
    assert "ann" in shown
    assert SECRET not in shown
    assert "pin-of-ann" not in shown
    assert f"Answered; run {run_id} goes on." in shown
    await house.until(run_id, "paused")

    for secret in (SECRET, "pin-of-ann"):
        assert holding(house.settings, secret) <= {"flow.db", "flow.db-wal"}
        assert secret not in await house.story(run_id)
    for name in ("flow.db", "flow.db-wal"):
        assert (house.settings.home / name).stat().st_mode & 0o777 == 0o600
    [logged] = await house.events(run_id, ev.Logged)
    assert re.fullmatch(r"the password is \[secret a-[0-9a-f]{12}\]", logged.message)
    [answered] = await house.events(run_id, ev.RequestAnswered)
    assert set(answered.value["password"]) == {"$secret"}
    assert (answered.value["user"], answered.value["tries"]) == ("ann", 3)
    assert answered.via == "terminal"

    await house.resume(run_id)
    assert await house.finished(run_id) == f"ann 3 {len(SECRET)} ********** None"
    assert not holding(house.settings, SECRET)
    assert not holding(house.settings, "pin-of-ann")


async def test_a_secret_typed_alone_is_not_shown_and_gone_after_a_cancellation(house: House) -> None:
    run_id, request = await asking(house, "shows")
    # In its own folder: what asks for a display or a browser is another test's.
    await house.control.cancel(run_id, PERSON, "not now")
    run_id, request = await asking(house, "guess")
    status, shown = await at_terminal(house.settings, "answer", request, typing=[("The code? (not shown) ", SECRET)])
    assert (status, SECRET in shown) == (0, False), shown
    await house.waiting(run_id, "waiting-input")
    assert holding(house.settings, SECRET)
    await house.control.cancel(run_id, PERSON, "enough")
    assert not holding(house.settings, SECRET)


async def test_a_secret_is_refused_on_the_command_line_from_a_pipe_and_from_the_model(house: House) -> None:
    run_id, request = await asking(house, "code")
    status, shown = await at_terminal(house.settings, "answer", request, "246810")
    assert status == 1
    assert "asks for a secret, which a command line would show" in shown
    done = await anyio.run_process(
        [sys.executable, "-m", "mcp_flow", "answer", request],
        input=b"246810\n",
        env=os.environ | house.settings.environment(),
        check=False,
    )
    assert done.returncode == 1
    assert b"Only a person may answer" in done.stderr
    with pytest.raises(NotAllowed, match="types the secret unseen"):
        await house.control.resume(run_id, AGENT, value="246810", has_value=True)
    assert not holding(house.settings, "246810")
    await house.control.cancel(run_id, PERSON, "seen")
    status, shown = await at_terminal(house.settings, "answer", request)
    assert status == 1
    assert "was withdrawn" in shown
    assert "The code?" not in shown.replace(request, "")


async def test_a_secret_that_does_not_fit_is_in_no_error_and_asked_for_again(house: House) -> None:
    run_id, request = await asking(house, "code")
    with pytest.raises(InvalidInput) as refused:
        await answer(house, run_id, request, {"no": SECRET})
    assert SECRET not in str(refused.value)
    await answer(house, run_id, request, SECRET)
    [reset] = [await house.event(run_id, ev.StepReset)]
    assert reset.reason == "the workflow's own check refused the answer"
    second = await house.waiting(run_id, "waiting-input")
    assert SECRET not in await house.story(run_id)
    await answer(house, run_id, second.opened.request_id, "135790")
    assert await house.finished(run_id) == 6
    assert not holding(house.settings, SECRET)


async def test_a_secret_in_an_error_is_masked_and_one_in_a_result_refused(house: House) -> None:
    for workflow, word in (("boom", "wrong code: [secret a-"), ("tells", "is in the result of step 'tell'")):
        run_id, request = await asking(house, workflow)
        await answer(house, run_id, request, SECRET)
        run = await house.until(run_id, "failed")
        assert run.error
        assert word in run.error.message
        async with Client(build(house.settings)) as client:
            shown = await call(client, "get_run", run_id=run_id, since=0, limit=500)
            listed = await call(client, "list_runs", query=run_id)
        assert SECRET not in str(shown) + str(listed)
        await house.control.cancel(run_id, PERSON, "seen")
    assert not holding(house.settings, SECRET)


async def test_a_secret_given_in_the_wrong_place_is_refused_or_masked_and_never_journaled(house: House) -> None:
    run_id, request = await asking(house, "keeps")
    await answer(house, run_id, request, SECRET)
    second = (await house.waiting(run_id, "waiting-input")).opened.request_id
    before = (await house.control.run(run_id)).seq
    where = r"secret that was given to step 'The code\?#1'.*nothing was written"
    with pytest.raises(InvalidInput, match=where):
        await answer(house, run_id, second, f"it is {SECRET}")
    with pytest.raises(InvalidInput, match=where):
        await house.control.send_event("paid", {"with": [SECRET]}, AGENT, run_id)
    assert (await house.control.run(run_id)).seq == before
    await answer(house, run_id, second, "something else")
    await house.waiting(run_id, "waiting-event")
    with pytest.raises(InvalidInput, match=where):
        await house.control.send_event("paid", SECRET, AGENT)
    await house.control.send_event("paid", "cash", AGENT)
    decided = await house.waiting(run_id, "waiting-approval")
    await house.control.approve(decided.opened.request_id, PERSON, "approve", f"with {SECRET}")
    paused = await house.waiting(run_id, "paused")
    assert re.fullmatch(r"something else cash with \[secret a-[0-9a-f]{12}\]", paused.opened.prompt)
    await house.control.hijack(run_id, AGENT, f"type {SECRET}")
    await house.resume(run_id)
    run = await house.until(run_id, "failed")
    assert run.error
    assert "is in the request 'Which?'" in run.error.message
    await house.control.cancel(run_id, PERSON, f"{SECRET} is wrong")
    assert SECRET not in await house.story(run_id)
    await until(lambda: not holding(house.settings, SECRET))


async def test_a_short_secret_is_kept_where_it_stands_alone_and_no_fingerprint_tells_it(house: House) -> None:
    runs = []
    for code in ("739", "461"):
        run_id, request = await asking(house, "short")
        await answer(house, run_id, request, code)
        await house.until(run_id, "paused")
        runs.append(run_id)
    run_id = runs[0]
    [logged] = await house.events(run_id, ev.Logged)
    assert re.fullmatch(r"the code is \[secret a-[0-9a-f]{12}\], of 27390", logged.message)
    journaled = {event.key: event.fingerprint for event in await house.events(run_id, ev.StepStarted)}
    plain = {
        "count#1": fingerprint.of_call(lambda: 739, ()),
        "type#1": fingerprint.of_call(lambda text, number, raw: 0, ("739", 739, b"739")),
        "send#1": fingerprint.of_call(partial(len, [{"code": "739"}]), ()),
    }
    assert [key for key, digest in plain.items() if journaled[key] == digest] == ["count#1"]

    # Another attempt comes to the same names and arguments.
    await house.stop_working()
    await house.working()
    await house.resume(run_id)
    run = await house.until(run_id, "failed")
    assert run.error
    assert "is in the result of step 'tell'" in run.error.message
    assert run.attempt == 2
    assert not await house.events(run_id, ev.StepNondeterministic)
    assert len(await house.events(run_id, ev.StepStarted)) == 5
    for run_id in runs:
        await house.control.cancel(run_id, PERSON, "seen")


async def test_a_step_that_asks_for_a_secret_gets_it_and_the_journal_does_not(house: House) -> None:
    run_id, request = await asking(house, "again")
    await answer(house, run_id, request, SECRET)
    assert await house.finished(run_id) == len(SECRET)
    assert SECRET not in await house.story(run_id)
    assert not holding(house.settings, SECRET)


async def test_a_page_that_shows_a_secret_answer_is_shown_without_it(house: House) -> None:
    run_id, request = await asking(house, "shows")
    await answer(house, run_id, request, SECRET)
    await house.until(run_id, "paused", "failed", seconds=30)
    async with Client(build(house.settings)) as client:
        seen = await text(client, "snapshot", run_id=run_id)
        assert "Your code is" in seen
        read = await call(client, "exec_js", run_id=run_id, code="document.body.innerText + document.title")
        assert "Your code is" in read["value"]
        thrown = await refusal(client, "exec_js", run_id=run_id, code="throw new Error(document.title)")
        logged = await call(client, "exec_js", run_id=run_id, mode="write", code="console.log(document.title)")
        shown = await call(client, "get_run", run_id=run_id, since=0, limit=500)
        pending = await call(client, "list_pending", run_id=run_id)
    assert logged["console"]
    for told in (seen, read, thrown, logged, shown, pending):
        assert SECRET not in str(told)
    await house.control.cancel(run_id, PERSON, "seen")
    # What the page has kept goes with it, once its worker has closed it.
    await until(lambda: not holding(house.settings, SECRET))


async def test_an_event_can_bring_no_secret(house: House) -> None:
    run_id = await house.control.start("event", {})
    run = await house.until(run_id, "failed")
    assert run.error
    assert "can't bring a secret" in run.error.message


async def test_who_knows_a_reference_does_not_get_its_secret(house: House) -> None:
    run_id, request = await asking(house, "guess")
    await answer(house, run_id, request, SECRET)
    [answered] = [await house.event(run_id, ev.RequestAnswered)]
    second = await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, request_id=second.opened.request_id, value=answered.value)
    assert await house.finished(run_id) == str(answered.value)


async def test_what_a_reader_kept_in_the_log_is_gone_once_the_home_is_opened_again(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")
    created = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r", input={})
    async with Store(settings, "test") as store, Store(settings, "test"):  # the second keeps the log in being
        await store.create("one", created)
        await store.answer_with_secrets("one", lambda _: [ev.EventReceived(name="e")], {"a-1": SECRET})
        assert await store.secret_answers("one") == {"a-1": SECRET}
        reader = sqlite3.connect(settings.database, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        await store.append("one", ev.RunCancelled(reason="enough"))
        assert await store.secret_answers("one") == {"": ""}
        assert holding(settings, SECRET)
        reader.close()
        async with Store(settings, "test") as opened:
            assert not holding(settings, SECRET)
            assert await opened.secret_answers("one") == {}


async def test_many_secrets_of_many_lengths_leave_nothing_behind(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")
    created = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r", input={})
    async with Store(settings, "test") as store, Store(settings, "test"):
        for number in range(6):
            await store.create(f"run{number}", created)
        for number in range(120):
            kept = {f"a-{number}-{part}": f"{SECRET}{number}." * (1 + number % 40 * 8) for part in range(2)}
            received = ev.EventReceived(name="e")
            await store.answer_with_secrets(f"run{number % 6}", lambda _, e=received: [e], kept)  # type: ignore[misc]
        for number in (3, 0, 5, 1, 4):
            await store.append(f"run{number}", ev.RunCancelled(reason="enough"))
        alive = await store.secret_answers("run2")
        assert len(alive) == 40
        command = ["grep", "-aoE", rf"{SECRET}[0-9]+\.", settings.database]
        found = await anyio.run_process(command)
        assert {int(number) % 6 for number in re.findall(rb"(\d+)\.", found.stdout)} == {2}
        await store.append("run2", ev.RunCancelled(reason="enough"))
        assert not holding(settings, SECRET)


class Inner(BaseModel):
    key: SecretStr


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (SecretStr, "s3cret"),
        (SecretBytes, "s3cret"),
        (SecretStr | None, "s3cret"),
        ({"user": str, "password": SecretStr}, {"user": "ann", "password": "s3cret"}),
        (Inner, {"key": "s3cret"}),
        (list[SecretStr], ["s3cret"]),
        (list[Inner], [{"key": "s3cret"}]),
        (dict[str, SecretStr], {"key": "s3cret"}),
        (dict[str, Inner], {"some": {"key": "s3cret"}}),
        (tuple[int, SecretStr], [1, "s3cret"]),
        (Inner | str, {"key": "s3cret"}),
    ],
)
def test_a_secret_is_set_apart_wherever_it_stands(schema: Any, value: Any) -> None:
    places = secret_places(shape_of(schema).schema)
    apart, kept = set_apart(value, places, lambda: "a-1")
    assert "s3cret" not in str(apart)
    assert kept == {"a-1": "s3cret"}
    assert reveal(apart, places, kept) == value
    with pytest.raises(StepError, match="erased"):
        reveal(apart, places, {})
    assert reveal({"$secret": "a-1"}, [], kept) == {"$secret": "a-1"}
