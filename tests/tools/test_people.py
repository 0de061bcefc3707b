"""Questions and decisions: who may answer, what does not fit, and what is settled already."""

from __future__ import annotations

from clients import call, ids, refusal
from mcp import Client


async def test_the_same_decision_again_is_fine_and_another_is_a_conflict(either: Client) -> None:
    run = await call(either, "start_run", workflow="order", input={"item": "pen"})
    request = run["pending"][0]["request_id"]
    assert (await call(either, "approve", request_id=request))["status"] == "finished"
    again = await call(either, "approve", request_id=request)
    assert (again["status"], again["run_id"]) == ("finished", run["run_id"])

    said = await refusal(either, "approve", request_id=request, decision="deny")
    assert said.startswith(f"Request {request} was answered already by agent via tool: approved. ")


async def test_a_denial_fails_the_run_with_its_note(either: Client) -> None:
    run = await call(either, "start_run", workflow="order", input={"item": "pen"})
    request = run["pending"][0]["request_id"]
    run = await call(either, "approve", request_id=request, decision="deny", note="too dear")
    assert (run["status"], run["error"]["type"]) == ("failed", "Denied")
    assert "too dear" in run["error"]["message"]
    assert "answered already" in await refusal(either, "approve", request_id=request, decision="approve")


async def test_a_decision_is_one_of_two_words(client: Client) -> None:
    assert "- decision: " in await refusal(client, "approve", request_id="x", decision="maybe")


async def test_a_request_for_a_person_is_refused_with_what_the_person_types(either: Client) -> None:
    run = await call(either, "start_run", workflow="guarded")
    request = run["pending"][0]
    assert request["by"] == "human"
    assert f"a person types: mcp-flow approve {request['request_id']}" in run["next"]
    for decision in ("approve", "deny"):
        said = await refusal(either, "approve", request_id=request["request_id"], decision=decision)
        assert "Only a person" in said
        assert f"mcp-flow approve {request['request_id']}" in said
    after = await call(either, "get_run", run_id=run["run_id"])
    assert after["status"] == "waiting-approval"
    await call(either, "cancel", run_id=run["run_id"], reason="seen")


async def test_an_answer_that_does_not_fit_names_its_fields_and_leaves_the_question_open(either: Client) -> None:
    run = await call(either, "start_run", workflow="address")
    assert run["status"] == "waiting-input"
    [request] = run["pending"]
    assert request["schema"]["required"] == ["street", "number"]
    assert run["next"].endswith('value={"street": …, "number": …})')

    said = await refusal(either, "resume", run_id=run["run_id"], value={"street": 7, "number": "x"})
    assert "which stays open" in said
    assert "- street: " in said
    assert "- number: " in said
    assert "'number' is a required" in await refusal(either, "resume", run_id=run["run_id"], value={"street": "a"})
    assert (await call(either, "get_run", run_id=run["run_id"]))["pending"] == [request]

    run = await call(either, "resume", run_id=run["run_id"], value='{"street": "Elm", "number": 3}')
    assert run["output"] == {"street": "Elm", "number": 3}


async def test_a_question_is_not_answered_by_what_answers_something_else(client: Client) -> None:
    run = await call(client, "start_run", workflow="address")
    run_id, request = run["run_id"], run["pending"][0]["request_id"]
    assert "resume(" in await refusal(client, "approve", request_id=request)
    assert request in await refusal(client, "resume", run_id=run_id, step="again")
    assert request in await refusal(client, "resume", run_id=run_id, request_id="r-nothing", value=1)
    assert "waits for a value" in await refusal(client, "resume", run_id=run_id, request_id=request)
    note = (await call(client, "resume", run_id=run_id))["note"]
    assert "Nothing changed" in note
    assert request in note
    await call(client, "cancel", run_id=run_id, reason="seen")

    run = await call(client, "start_run", workflow="order", input={"item": "pen"})
    request = run["pending"][0]["request_id"]
    said = await refusal(client, "resume", run_id=run["run_id"], request_id=request)
    assert "approve(request_id=" in said
    assert "Nothing changed" in (await call(client, "resume", run_id=run["run_id"]))["note"]
    assert request in await refusal(client, "resume", run_id=run["run_id"], value=True)
    await call(client, "cancel", run_id=run["run_id"], reason="seen")


async def test_pending_is_paged_filtered_and_says_how_to_answer(client: Client) -> None:
    runs = [await call(client, "start_run", workflow="word", run_id=f"word-{number}") for number in range(3)]
    runs.append(await call(client, "start_run", workflow="order", input={"item": "pen"}, run_id="word-order"))
    every = await call(client, "list_pending")
    assert [r["run_id"] for r in every["requests"] if r["run_id"].startswith("word-")] == ids(runs)
    assert every["next"] == every["requests"][0]["answer"]
    assert all(request["age_s"] >= 0 for request in every["requests"])
    assert every["failed"] >= 0

    found, cursor = [], None
    while not found or cursor:
        page = await call(client, "list_pending", kind="input", limit=2, **({"cursor": cursor} if cursor else {}))
        assert {request["kind"] for request in page["requests"]} == {"input"}
        found += page["requests"]
        cursor = page.get("cursor")
        assert cursor is None or ('kind="input"' in page["next"] and cursor in page["next"])
    assert {"word-0", "word-1", "word-2"} <= {request["run_id"] for request in found}
    assert "word-order" not in {request["run_id"] for request in found}

    [only] = (await call(client, "list_pending", run_id="word-order"))["requests"]
    assert only["kind"] == "approval"
    assert "is no cursor" in await refusal(client, "list_pending", cursor="WyIxIl0=")
    assert "There is no run" in await refusal(client, "list_pending", run_id="nobody")
    for run in runs:
        await call(client, "cancel", run_id=run["run_id"], reason="seen")
    assert (await call(client, "list_pending", run_id="word-order"))["requests"] == []
