"""Workflow files written through a client: where that is enabled, in the folder, checked, over what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest
from clients import call, refusal
from mcp import Client

from mcp_flow import control
from mcp_flow.config import Settings
from mcp_flow.revisions import capture
from mcp_flow.server import build
from mcp_flow.store import Store

SOURCE = '''from mcp_flow import Flow, workflow


@workflow
async def greet(flow: Flow) -> str:
    """Greet."""
    return "one"
'''
TWO = SOURCE.replace("one", "two")


async def test_a_workflow_is_written_only_where_that_is_enabled(client: Client, home: Settings) -> None:
    said = await refusal(client, "save_workflow", name="greet", source=SOURCE)
    assert "MCP_FLOW_SAVE_WORKFLOWS=on" in said
    assert str(home.workflows) in said
    assert not (home.workflows / "greet.py").exists()


async def test_a_file_is_written_once_it_can_be_imported_over_the_revision_that_was_expected(
    make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make({"kept.py": SOURCE.replace("greet", "kept")}, save_workflows=True)
    folder = settings.workflows
    file = folder / "greet.py"

    async with Client(build(settings)) as client:
        for name in ("../evil", "/tmp/evil", "a/../../evil", ""):
            await refusal(client, "save_workflow", name=name, source=SOURCE)
        assert "nope" in await refusal(client, "save_workflow", name="greet", source=f"import nope\n{SOURCE}")
        assert "no workflow" in await refusal(client, "save_workflow", name="greet", source="x = 1\n")
        assert list_of(folder) == ["kept.py"]
        assert not (folder.parent / "evil.py").exists()

        saved = await call(client, "save_workflow", name="greet", source=SOURCE)
        assert (saved["file"], file.read_text()) == (str(file), SOURCE)
        first = (await call(client, "list_workflows", name="greet"))["revision"]
        assert saved["revision"] == first
        for expected in ({}, {"expected_revision": "deadbeef0000"}, {"expected_revision": first[:4]}):
            said = await refusal(client, "save_workflow", name="greet", source=TWO, **expected)
            assert f"holds revision {first}" in said
            assert 'list_workflows(name="greet")' in said.replace("'", '"')
        assert file.read_text() == SOURCE

        before = await anyio.to_thread.run_sync(capture, folder, "greet.py")
        edited = SOURCE.replace("one", "by hand")
        file.write_text(edited)
        by_hand = await anyio.to_thread.run_sync(capture, folder, "greet.py")
        said = await refusal(client, "save_workflow", name="greet", source=TWO, expected_revision=first)
        assert by_hand.hash[:12] in said
        with monkeypatch.context() as patch:
            patch.setattr(control, "write", full_disk)
            failed = await client.call_tool(
                "save_workflow", {"name": "greet", "source": TWO, "expected_revision": by_hand.hash[:12]}
            )
        assert failed.is_error
        async with Store(settings, "test") as store:
            assert (await store.load_revision(by_hand.hash))[1]["greet.py"] == edited.encode(), "kept before it is lost"

        await call(client, "save_workflow", name="greet", source=TWO, expected_revision=by_hand.hash[:12])
        assert file.read_text() == TWO
        run = await call(client, "start_run", workflow="greet")
        assert (run["status"], run["output"]) == ("finished", "two")
        assert before.hash != by_hand.hash


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def list_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".py")
