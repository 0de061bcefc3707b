"""What a workflow's author is promised: steps, waits, values that last, and errors that point at the code."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from clients import call
from harness import AGENT, PERSON, House, open_house, visit
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.errors import BrokenWorkflow, InvalidInput, NotAllowed
from mcp_flow.server import build

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("flow")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


# --- steps ---


async def test_a_finished_step_is_not_done_again_in_the_next_attempt(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            first = await flow.step("first", lambda: did("first"))
            if not is_open("mended"):
                raise RuntimeError("not yet")
            return [first, await flow.step("second", lambda: did("second")), flow.attempt]
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await house.finished(run_id) == ["first", "second", 2]
    assert house.did() == ["first", "second"]


async def test_async_code_runs_on_the_loop_and_any_other_in_a_thread(house: House) -> None:
    run_id = await house.start(
        """
        def plain() -> str:
            return threading.current_thread().name

        async def coroutine() -> str:
            return threading.current_thread().name

        @workflow
        async def main(flow: Flow) -> list:
            here = threading.current_thread().name
            names = [
                await flow.step("plain", plain),
                await flow.step("coroutine", coroutine),
                await flow.step("lambda", lambda: coroutine()),
                await flow.step("partial", functools.partial(coroutine)),
            ]
            return [name == here for name in names]
        """
    )
    assert await house.finished(run_id) == [False, True, True, True]


async def test_a_result_has_the_annotated_type_live_and_on_replay(house: House) -> None:
    run_id = await house.start(
        """
        class Total(BaseModel):
            amount: int
            due: date

        @dataclasses.dataclass
        class Item:
            name: str

        async def total() -> Total:
            return Total(amount=5, due=date(2031, 5, 1))

        def items() -> list[Item]:
            return [Item("a"), Item("b")]

        @workflow
        async def main(flow: Flow) -> str:
            seen = repr([await flow.step("total", total), await flow.step("items", items)])
            did(seen)
            if not is_open("mended"):
                raise RuntimeError("again")
            return seen
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await house.finished(run_id) == (
        "[Total(amount=5, due=datetime.date(2031, 5, 1)), [Item(name='a'), Item(name='b')]]"
    )
    live, replayed = house.did()
    assert live == replayed


async def test_a_result_that_is_no_json_fails_naming_the_step_and_is_not_finished(house: House) -> None:
    run_id = await house.start(
        """
        def thread():
            return threading.Lock()

        @workflow
        async def main(flow: Flow):
            await flow.step("make a lock", thread)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert (run.error.type, run.error.step) == ("StepResultError", "make a lock")
    assert "make a lock" in run.error.message
    assert run.steps["make a lock#1"].status == "failed"
    assert not await house.events(run_id, ev.StepFinished)


async def test_a_failing_step_is_tried_again_as_often_as_asked(house: House) -> None:
    run_id = await house.start(
        """
        waits = []

        def shaky():
            if len(HERE.joinpath("did").read_text().splitlines() if HERE.exists() else []) < 2:
                did("try")
                raise ValueError("shaky")
            return did("done")

        def soon(n):
            waits.append(n)
            return 0

        @workflow
        async def main(flow: Flow) -> list:
            await flow.step("shaky", shaky, retries=2, backoff=soon)
            return waits
        """
    )
    assert await house.finished(run_id) == [1, 2]
    assert house.did() == ["try", "try", "done"]
    assert [event.number for event in await house.events(run_id, ev.StepStarted)] == [1, 2, 3]


async def test_the_last_failed_try_fails_the_run_with_the_steps_own_error(house: House) -> None:
    run_id = await house.start(
        """
        def broken():
            raise ValueError("broken " + did("try"))

        @workflow
        async def main(flow: Flow):
            await flow.step("break", broken, retries=1, backoff=lambda n: 0)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert (run.error.type, run.error.message, run.error.step) == ("ValueError", "broken try", "break")
    assert (run.error.file, run.error.line) == (str(house.file), house.line_of("raise ValueError"))
    assert run.error.source == 'raise ValueError("broken " + did("try"))'
    assert house.did() == ["try", "try"]


async def test_a_step_that_takes_too_long_raises_step_timeout(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            try:
                await flow.step("wait", until_open, "never", timeout=0.02)
            except FlowError as error:
                return type(error).__name__ + ": " + str(error)
        """
    )
    assert await house.finished(run_id) == "StepTimeout: Step 'wait' did not end within its 0.02 s."


async def test_a_timeout_of_the_workflows_own_is_not_taken_for_the_steps(house: House) -> None:
    run_id = await house.start(
        """
        def impatient():
            raise TimeoutError("mine")

        @workflow
        async def main(flow: Flow):
            await flow.step("wait", impatient, timeout=60)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert (run.error.type, run.error.message) == ("TimeoutError", "mine")


async def test_a_once_step_that_raised_is_in_doubt_and_takes_the_value_of_whoever_looked(house: House) -> None:
    run_id = await house.start(
        """
        def pay() -> int:
            did("pay")
            raise ConnectionError("lost")

        @workflow
        async def main(flow: Flow) -> int:
            return await flow.step("pay", pay, once=True, retries=3, backoff=lambda n: 0)
        """
    )
    request = await house.waiting(run_id, "in-doubt")
    assert "pay" in request.opened.prompt
    assert "ConnectionError: lost" in request.opened.prompt
    with pytest.raises(NotAllowed):
        await house.resume(run_id, value=5)
    await house.resume(run_id, step="done", value=41)
    assert await house.finished(run_id) == 41
    assert house.did() == ["pay"]


async def test_a_once_step_in_doubt_is_done_again_when_somebody_says_so(house: House) -> None:
    run_id = await house.start(
        """
        def pay() -> int:
            did("pay")
            if not is_open("mended"):
                raise ConnectionError("lost")
            return 7

        @workflow
        async def main(flow: Flow) -> int:
            return await flow.step("pay", pay, once=True)
        """
    )
    first = await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="again")
    await house.event(run_id, ev.RequestOpened, lambda event: event.request_id != first.opened.request_id)
    await house.waiting(run_id, "in-doubt")
    house.open("mended")
    await house.resume(run_id, step="again")
    assert await house.finished(run_id) == 7
    assert house.did() == ["pay"] * 3


async def test_the_value_of_a_step_in_doubt_must_fit_and_is_asked_for_again_otherwise(house: House) -> None:
    run_id = await house.start(
        """
        def pay() -> int:
            raise ConnectionError(did("pay"))

        @workflow
        async def main(flow: Flow) -> int:
            return await flow.step("pay", pay, once=True)
        """
    )
    await house.waiting(run_id, "in-doubt")
    with pytest.raises(InvalidInput):
        await house.resume(run_id, step="done", value="no number")
    await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="done", value=3)
    assert await house.finished(run_id) == 3
    assert house.did() == ["pay"]


async def test_a_once_step_that_timed_out_is_in_doubt(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("pay", until_open, "never", once=True, timeout=0.02)
        """
    )
    assert "StepTimeout" in (await house.waiting(run_id, "in-doubt")).opened.prompt


async def test_a_once_step_that_was_cancelled_is_in_doubt_when_reached_again(house: House) -> None:
    run_id = await house.start(
        """
        async def pay():
            did("pay")
            await until_open("never")

        @workflow
        async def main(flow: Flow):
            async with asyncio.timeout(0.1):
                await flow.step("pay", pay, once=True)
        """
    )
    await house.until(run_id, "failed")
    await house.resume(run_id)
    await house.waiting(run_id, "in-doubt")
    assert house.did() == ["pay"]


async def test_retriable_says_that_nothing_happened_so_a_once_step_is_tried_again(house: House) -> None:
    run_id = await house.start(
        """
        def pay():
            did("try")
            if not is_open("up"):
                raise Retriable("the bank is closed")
            return "paid"

        @workflow
        async def main(flow: Flow) -> str:
            return await flow.step("pay", pay, once=True, retries=1, backoff=lambda n: 0)
        """
    )
    run = await house.until(run_id, "paused")
    assert run.steps["pay#1"].error
    assert run.steps["pay#1"].error.type == "Retriable"
    assert house.did() == ["try", "try"]
    house.open("up")
    await house.resume(run_id)
    assert await house.finished(run_id) == "paid"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ('flow.step("s", did, "x", once=True, restore=True)', "both once and restore"),
        ('flow.step("s", did("x"))', "can't be called"),
        ('flow.step("s", did, "x", retries=-1)', "retries can't be negative"),
        ('flow.step("  ", did, "x")', "needs a name"),
        ('flow.attach("../x", b"")', "plain file name"),
        ('flow.attach("x", "text")', "takes bytes"),
        ('flow.approve("Pay?", on_deny="ignore")', "none of 'fail', 'return'"),
        ('flow.approve("Pay?", by="person")', "none of 'anyone', 'human'"),
        ('flow.ask("Which?", by="me")', "none of 'anyone', 'agent', 'human'"),
    ],
)
async def test_a_mistaken_call_is_refused_by_name(house: House, call: str, why: str) -> None:
    run_id = await house.start(
        f"""
        @workflow
        async def main(flow: Flow):
            await {call}
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.type == "StepError"
    assert why in run.error.message
    assert run.error.line == house.line_of(call)


async def test_on_fail_continue_journals_the_failure_and_goes_on(house: House) -> None:
    run_id = await house.start(
        """
        def broken() -> int:
            raise ValueError(did("try"))

        @workflow
        async def main(flow: Flow) -> list:
            got = await flow.step("optional", broken, on_fail="continue")
            if not is_open("mended"):
                raise RuntimeError("again")
            return [got]
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await house.finished(run_id) == [None]
    assert house.did() == ["try"]
    [failed] = await house.events(run_id, ev.StepFailed)
    assert failed.error.message == "try"


async def test_a_step_within_a_step_is_refused_by_name(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            async def outer():
                await flow.step("inner", did, "inner")
            await flow.step("outer", outer)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.type == "NestedStep"
    assert "'inner'" in run.error.message
    assert "'outer'" in run.error.message
    assert house.did() == []


async def test_a_wait_within_a_step_is_refused(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("outer", lambda: flow.approve("Really?"))
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.type == "NestedStep"
    assert not run.requests


async def test_a_long_steps_start_is_in_the_journal_before_its_end(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("long", until_open, "end")
        """
    )
    started = await house.event(run_id, ev.StepStarted)
    assert started.key == "long#1"
    assert not await house.events(run_id, ev.StepFinished)
    house.open("end")
    await house.finished(run_id)


async def test_a_short_steps_start_is_in_the_journal_once(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            for n in range(3):
                await flow.step("short", did, n)
        """
    )
    await house.finished(run_id)
    assert [event.key for event in await house.events(run_id, ev.StepStarted)] == ["short#1", "short#2", "short#3"]


# --- secrets ---


async def test_a_secret_is_neither_journaled_as_a_result_nor_shown_in_an_error(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_FLOW_SECRET_SHOP", "hunter2-and-more")
    run_id = await house.start(
        """
        def reveal():
            return "it is " + os.environ["MCP_FLOW_SECRET_SHOP"]

        def blurt(text):
            raise ValueError("wrong password " + text)

        @workflow
        async def main(flow: Flow):
            secret = flow.secret("shop")
            await flow.log("signing in with " + secret)
            try:
                await flow.step("reveal", reveal)
            except FlowError as error:
                await flow.log(str(error))
            await flow.progress(1, 2, secret)
            await flow.step("use " + secret, did, "use")
            if not is_open("mended"):
                await flow.step("blurt", blurt, secret)
            await flow.step("pay", blurt, secret, once=True)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.message == "wrong password [secret shop]"
    assert [event.message for event in await house.events(run_id, ev.Logged)] == [
        "signing in with [secret shop]",
        "The secret 'shop' is in the result of step 'reveal'; it was not journaled.",
    ]
    house.open("mended")
    await house.resume(run_id)
    assert "wrong password [secret shop]" in (await house.waiting(run_id, "in-doubt")).opened.prompt
    assert house.did() == ["use"]
    for file in house.settings.home.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


async def test_a_secret_as_output_or_question_or_attachment_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_FLOW_SECRET_SHOP", "hunter2-and-more")
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            secret, found = flow.secret("shop"), []
            for call in (
                lambda: flow.approve("Sign in?", data={"password": secret}),
                lambda: flow.ask("Is " + secret + " right?"),
                lambda: flow.attach("a.txt", secret.encode()),
            ):
                try:
                    await call()
                except FlowError as error:
                    found.append(type(error).__name__)
            assert len(found) == 3, found
            return secret
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert "The secret 'shop' is in the workflow's output" in run.error.message
    for file in house.settings.home.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


async def test_a_missing_secret_and_an_open_secrets_file_are_named(house: House) -> None:
    source = """
        @workflow
        async def main(flow: Flow) -> str:
            return str(len(flow.secret("bank")))
        """
    run = await house.until(await house.start(source), "failed")
    assert run.error
    assert "MCP_FLOW_SECRET_BANK" in run.error.message
    file = house.settings.home / "secrets.toml"
    file.write_text('bank = "0123456789"')
    file.chmod(0o644)
    run = await house.until(await house.again(), "failed")
    assert run.error
    assert f"chmod 600 {file}" in run.error.message
    file.chmod(0o600)
    assert await house.finished(await house.again()) == "10"
    file.unlink()


# --- waiting ---


async def test_a_pause_holds_the_run_until_resume(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.pause("look at the form")
            return flow.attempt
        """
    )
    request = await house.waiting(run_id, "paused")
    assert request.opened.prompt == "look at the form"
    await house.resume(run_id)
    assert await house.finished(run_id) == 1


async def test_an_approval_shows_its_data_and_gives_a_truthy_decision(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            decision = await flow.approve("Pay?", data={"total": 3, "on": date(2031, 5, 1)})
            return [bool(decision), decision.note, decision.by]
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    assert request.opened.data == {"total": 3, "on": "2031-05-01"}
    await house.approve(request, note="go")
    assert await house.finished(run_id) == [True, "go", "agent"]


async def test_a_denial_fails_the_run_with_the_note_or_is_returned(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            decision = await flow.approve("First?", on_deny="return")
            did(f"{bool(decision)} {decision.note}")
            await flow.approve("Second?")
        """
    )
    await house.approve(await house.waiting(run_id, "waiting-approval"), deny=True, note="too dear")
    await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "Second?")
    await house.approve(await house.waiting(run_id, "waiting-approval"), deny=True, note="still")
    run = await house.until(run_id, "failed")
    assert house.did() == ["False too dear"]
    assert run.error
    assert (run.error.type, run.error.message) == ("Denied", "Second? was denied: still")


async def test_what_only_a_person_may_decide_an_agent_may_not(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.approve("Pay?", by="human")
            return await flow.ask("Code?", by="human")
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    with pytest.raises(NotAllowed, match="person"):
        await house.approve(request)
    await house.control.approve(request.opened.request_id, PERSON, "approve", None)
    await house.waiting(run_id, "waiting-input")
    with pytest.raises(NotAllowed, match="person"):
        await house.resume(run_id, value="1234")
    await house.control.resume(run_id, PERSON, value="1234", has_value=True)
    assert await house.finished(run_id) == "1234"


async def test_answers_come_back_in_the_types_that_were_asked_for(house: House) -> None:
    run_id = await house.start(
        """
        class Address(BaseModel):
            street: str
            zip: int

        @workflow
        async def main(flow: Flow) -> list:
            name = await flow.ask("Name?")
            age = await flow.ask("Age?", int)
            when = await flow.ask("When?", date)
            address = await flow.ask("Where?", Address)
            form = await flow.ask("Form?", {"size": int, "colour": (str, "red")})
            pair = await flow.ask("Pair?", ["left", "right"])
            return [name, age, repr(when), address.zip, form.size, form.colour, pair.left]
        """
    )
    answers = ["Ada", 36, "2031-05-01", {"street": "High", "zip": 7}, {"size": 4}, {"left": "l", "right": "r"}]
    asked = set()
    for answer in answers:
        await house.event(run_id, ev.RequestOpened, lambda event: event.request_id not in asked)
        request = await house.waiting(run_id, "waiting-input")
        asked.add(request.opened.request_id)
        await house.resume(run_id, value=answer)
    assert await house.finished(run_id) == ["Ada", 36, "datetime.date(2031, 5, 1)", 7, 4, "red", "l"]


async def test_an_answer_that_does_not_fit_is_refused_and_the_request_stays(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            return await flow.ask("How many?", int)
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    with pytest.raises(InvalidInput, match="How many"):
        await house.resume(run_id, value="many")
    assert (await house.waiting(run_id, "waiting-input")).opened.request_id == request.opened.request_id
    await house.resume(run_id, value="12")
    assert await house.finished(run_id) == 12


async def test_an_answer_that_only_the_type_itself_can_refuse_is_asked_for_again_with_the_reason(house: House) -> None:
    run_id = await house.start(
        """
        from typing import Annotated
        from pydantic import AfterValidator

        def even(n):
            if n % 2:
                raise ValueError("not even")
            return n

        def pay() -> Annotated[int, AfterValidator(even)]:
            raise ConnectionError("gone")

        @workflow
        async def main(flow: Flow) -> int:
            number = await flow.ask("Even?", Annotated[int, AfterValidator(even)], expires=600)
            return number + await flow.step("pay", pay, once=True)
        """
    )
    first = await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value=3)
    again = await house.event(run_id, ev.RequestOpened, lambda event: event.request_id != first.opened.request_id)
    assert "not even" in str(again.put_aside)
    assert again.expires == first.opened.expires
    async with Client(build(house.settings)) as client:
        [shown] = (await call(client, "list_pending", run_id=run_id))["requests"]
        [pending] = (await call(client, "get_run", run_id=run_id))["pending"]
    assert shown["put_aside"] == pending["put_aside"] == again.put_aside
    await house.resume(run_id, value=4)

    doubt = await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="done", value=5)
    await house.event(run_id, ev.RequestOpened, lambda event: event.put_aside != again.put_aside and event.generation)
    assert (await house.waiting(run_id, "in-doubt")).opened.request_id != doubt.opened.request_id
    await house.resume(run_id, step="done", value=6)
    assert await house.finished(run_id) == 10


async def test_questions_asked_in_a_loop_are_separate_questions(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            return [await flow.ask("Next?", int) for _ in range(3)]
        """
    )
    for number in range(3):
        await house.event(run_id, ev.RequestOpened, lambda event, number=number: event.key == f"Next?#{number + 1}")
        await house.until(run_id, "waiting-input")
        await house.resume(run_id, value=number)
    assert await house.finished(run_id) == [0, 1, 2]


async def test_at_its_deadline_a_question_takes_its_default_or_fails_and_an_approval_is_denied(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            taken = await flow.ask("How many?", int, default=3, expires=0.05)
            decision = await flow.approve("Pay?", expires=timedelta(seconds=0.05), on_deny="return")
            try:
                await flow.ask("Who?", expires=0.05)
            except FlowError as error:
                return [taken, bool(decision), decision.note, type(error).__name__]
        """
    )
    assert await house.finished(run_id) == [3, False, "nobody decided in time", "RequestExpired"]


async def test_branches_wait_side_by_side_and_each_goes_on_with_its_own_answer(house: House) -> None:
    run_id = await house.start(
        """
        async def branch(flow, name):
            with flow.scope(name):
                answer = await flow.ask("What?", name="what")
                await flow.step("use", did, f"{name} {answer}")
                return answer

        @workflow
        async def main(flow: Flow) -> list:
            return await asyncio.gather(branch(flow, "left"), branch(flow, "right"))
        """
    )
    run = await house.until(run_id, "waiting-input")
    by_key = {request.opened.key: request.opened.request_id for request in run.open_requests()}
    assert sorted(by_key) == ["left/what#1", "right/what#1"]
    await house.resume(run_id, request_id=by_key["right/what#1"], value="R")
    await house.event(run_id, ev.StepFinished, lambda event: event.key == "right/use#1")
    request = await house.waiting(run_id, "waiting-input")
    assert request.opened.key == "left/what#1"
    assert house.did() == ["right R"]
    await house.resume(run_id, value="L")
    assert await house.finished(run_id) == ["L", "R"]
    assert house.did() == ["right R", "left L"]


async def test_a_run_still_waits_when_the_answered_branch_just_ends(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            async with asyncio.TaskGroup() as group:
                both = [group.create_task(flow.approve(name)) for name in ("a", "b")]
            return [bool(task.result()) for task in both]
        """
    )
    run = await house.until(run_id, "waiting-approval")
    first, second = run.open_requests()
    await house.approve(first)
    request = await house.waiting(run_id, "waiting-approval")
    assert request.opened.request_id == second.opened.request_id
    await house.approve(second)
    assert await house.finished(run_id) == [True, True]


async def test_a_branch_that_is_given_up_withdraws_its_question(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            try:
                async with asyncio.timeout(0.05):
                    await flow.ask("Quick?")
            except TimeoutError:
                pass
            return await flow.ask("Then this?")
        """
    )
    await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "Then this?")
    request = await house.waiting(run_id, "waiting-input")
    assert request.opened.prompt == "Then this?"
    await house.resume(run_id, value="yes")
    assert await house.finished(run_id) == "yes"


# --- values and remarks ---


async def test_what_is_random_is_the_same_in_every_attempt(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> bool:
            values = [await flow.now(), await flow.now(), await flow.random(), await flow.uuid(), await flow.uuid()]
            did(repr(values))
            if not is_open("mended"):
                raise RuntimeError("again")
            return values[3] != values[4] and isinstance(values[0], datetime)
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await house.finished(run_id) is True
    first, second = house.did()
    assert first == second


async def test_remarks_are_journaled_once_however_often_they_are_replayed(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            for n in range(2):
                await flow.log("again and again")
                await flow.progress(n, 2, "half")
            path = await flow.attach("note.txt", b"kept")
            if not is_open("mended"):
                raise RuntimeError("again")
            return path
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await anyio.Path(await house.finished(run_id)).read_bytes() == b"kept"
    assert len(await house.events(run_id, ev.Logged)) == 2
    assert [event.done for event in await house.events(run_id, ev.ProgressReported)] == [0, 1]
    assert len(await house.events(run_id, ev.ArtifactKept)) == 1


# --- failing and repairing ---


async def test_a_wrong_return_value_fails_the_run_and_says_so(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            return "many"
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert "returned 'many' (str)" in run.error.message


async def test_an_error_in_a_task_group_is_the_error_of_the_branch(house: House) -> None:
    run_id = await house.start(
        """
        async def branch(flow):
            raise KeyError("missing")

        @workflow
        async def main(flow: Flow):
            async with asyncio.TaskGroup() as group:
                group.create_task(branch(flow))
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert (run.error.type, run.error.message) == ("KeyError", "'missing'")
    assert run.error.line == house.line_of("raise KeyError")


async def test_several_errors_in_a_task_group_are_all_named(house: House) -> None:
    run_id = await house.start(
        """
        async def branch(error):
            raise error

        @workflow
        async def main(flow: Flow):
            async with asyncio.TaskGroup() as group:
                group.create_task(branch(KeyError("one")))
                group.create_task(branch(ValueError("two")))
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert "'one'" in run.error.message
    assert "ValueError: two" in run.error.message


async def test_a_repaired_file_is_imported_anew_and_what_is_done_is_skipped(house: House) -> None:
    run_id = await house.start(
        """
        def parse(text) -> int:
            return int(text)

        @workflow
        async def main(flow: Flow) -> int:
            text = await flow.step("fetch", did, "12 EUR")
            return await flow.step("parse", parse, text)
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.source == "return int(text)"
    house.edit("int(text)", "int(text.split()[0])")
    await house.resume(run_id)
    assert await house.finished(run_id) == 12
    assert house.did() == ["12 EUR"]
    assert (await house.control.run(run_id)).attempt == 2


async def test_a_file_that_no_longer_imports_is_refused_and_the_run_is_unchanged(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            raise ValueError("first")
        """
    )
    before = await house.until(run_id, "failed")
    seq = before.seq
    house.edit('raise ValueError("first")', "raise ValueError(")
    with pytest.raises(BrokenWorkflow, match=house.file.name):
        await house.resume(run_id)
    after = await house.control.run(run_id)
    assert (after.seq, after.status, after.error) == (seq, "failed", before.error)
    house.edit("raise ValueError(", "return 'mended'")
    await house.resume(run_id)
    assert await house.finished(run_id) == "mended"


async def test_a_waiting_run_goes_on_with_code_that_was_changed_meanwhile(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.step("before", did, "before")
            answer = await flow.ask("What?")
            return "old " + answer
        """
    )
    await house.waiting(run_id, "waiting-input")
    house.edit("old ", "new ")
    await house.resume(run_id, value="answer")
    assert await house.finished(run_id) == "new answer"
    assert house.did() == ["before"]


async def test_an_approval_continues_the_revision_that_asked_although_the_file_changed(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.approve("Go?")
            return "old"
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    house.edit('"old"', '"new"')
    await house.approve(request)
    assert await house.finished(run_id) == "old"


# --- cancelling ---


async def test_a_running_run_can_be_cancelled_and_does_nothing_more(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            try:
                await flow.step("long", until_open, "end")
            except BaseException:
                await flow.step("after", did, "after")
        """
    )
    await house.event(run_id, ev.StepStarted)
    await house.control.cancel(run_id, AGENT, "enough")
    run = await house.until(run_id, "cancelled")
    assert run.reason == "enough"
    await house.stop_working()
    assert house.did() == []
    ended, released = (await house.control.events(run_id, 0, 100))[-2:]
    assert ended.event == ev.RunCancelled(reason="enough", by="agent")
    assert isinstance(released.event, ev.RunReleased)
    assert (await house.control.run(run_id)).owner is None


async def test_a_cancelled_waiting_run_withdraws_its_requests(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await asyncio.gather(flow.ask("A?"), flow.approve("B?"))
        """
    )
    await house.until(run_id, "waiting-approval")
    await house.control.cancel(run_id, AGENT, "enough")
    run = await house.until(run_id, "cancelled")
    assert {request.status for request in run.requests.values()} == {"withdrawn"}
    assert await house.control.requests(run_id, [], 10, None) == []


async def test_a_run_that_its_worker_has_already_is_not_executed_a_second_time(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.step("first", did, "first")
            await flow.step("gate", until_open, "gate")
            await flow.step("second", did, "second")
            return flow.attempt
        """
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "gate#1")
    assert house._worker
    house._worker[0].take(run_id, (await house.control.run(run_id)).epoch)
    await house.control.wait(run_id, 0.2)  # for what a second execution would do
    house.open("gate")
    assert await house.finished(run_id) == 1
    assert house.did() == ["first", "second"]
    assert len(await house.events(run_id, ev.AttemptStarted)) == 1
