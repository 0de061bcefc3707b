"""`make demo-repair`: a shop renames a button, a run fails, and an agent mends the code and lets the run go on.

It starts a demo shop on loopback, one whose buttons have new names, and `mcp-flow serve` as an MCP client would, over
stdio, on a copy of the workflow `buy`. Everything shown came over MCP, but for the agent's edit of the file and, at the
end, what the shop counted. Exits with 0 only if the run finished, within eight calls after its failure, and everything
was done once. It leaves nothing behind.
"""

# Imports of weight stand inside the functions: this file lies among the workflows, and mcp-flow reads those.
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo import EXAMPLES, SECONDS, SUMMARY, Agent, Stop

OLD_LABEL, NEW_LABEL = b"Add to cart", b"Put in basket"
CLICK, HURRIED_CLICK = 'name=f"Add to cart: {item}", exact=True).click()', "click(timeout=2_000)"
"""The click that will fail, and how the copy of the workflow has it: nobody should have to wait half a minute."""

ORDER = {"item": "Teapot", "quantity": 2}
TOTAL = "$49.80"
MOST_CALLS = 8
WAIT = 45
ONCE = {"/sign-in": 1, "/cart": 1, "/pay": 1}


class Mender(Agent):
    """An agent that can look again at the text of its last answer."""

    said = ""

    async def _send(self, why: str, tool: str, arguments: dict[str, Any]) -> Any:
        result = await super()._send(why, tool, arguments)
        self.said = "\n".join(block.text for block in result.content if block.type == "text")
        return result


@contextmanager
def changed_shop() -> Iterator[str]:
    """The address of a shop whose buttons were renamed; `/forms.json` says how often each of its forms was sent."""
    from unittest.mock import patch

    from shop import server

    forms: Counter[str] = Counter()

    class Changed(server.Handler):
        """One request."""

        def _get(self, path: str) -> None:
            if path == "/forms.json":
                self._json(forms)
            else:
                super()._get(path)

        def _post(self, path: str, fields: dict[str, str]) -> None:
            forms[path] += 1
            super()._post(path, fields)

        def _send(self, content: bytes, *rest: Any) -> None:
            super()._send(content.replace(OLD_LABEL, NEW_LABEL), *rest)

    with patch.object(server, "Handler", Changed), server.shop() as url:
        yield url


def fetched(url: str) -> Any:
    """What the shop answers in JSON."""
    from urllib.request import urlopen

    with urlopen(url, timeout=5) as answer:
        return json.loads(answer.read())


async def fail(agent: Mender, url: str) -> dict[str, Any]:
    """Start `buy`, which is in for a surprise; returns the failed run."""
    why = "Start a workflow. It was written before the shop renamed its buttons."
    run = await agent.call(why, "start_run", *SUMMARY, workflow="buy", input=ORDER | {"url": url}, wait_s=WAIT)
    while run["status"] in ("queued", "running"):
        run = await agent.call("Has it stopped?", "get_run", *SUMMARY, run_id=run["run_id"], wait_s=WAIT)
    if run["status"] != "failed":
        raise Stop(f"the run should have failed, and is {run['status']}")
    return run


async def repair(agent: Mender, run_id: str) -> dict[str, Any]:
    """From the failure to the end; returns the run as it ended."""
    run = await agent.call("Where and why?", "get_run", "status", "error", "steps", run_id=run_id)
    error = run["error"]
    why = "What does the page have instead? It is still as the failure left it."
    await agent.read(why, "snapshot", run_id=run_id, find=ORDER["item"])
    names = set(re.findall(rf'button "(.+): {ORDER["item"]}"', agent.said))
    if len(names) != 1:
        raise Stop(f"the page should have one button for a {ORDER['item']}, and has {sorted(names)}")
    name = names.pop()
    locator = f'role=button[name="{name}: {ORDER["item"]}"s]'
    sent = await agent.call(
        "Try the new name on the live page, without touching it: what would that button send?",
        *("exec_js", "value", "type"),
        run_id=run_id,
        locator=locator,
        code="({to: element.form.getAttribute('action'), item: element.form.item.value})",
    )
    if sent["value"] != {"to": "/cart", "item": ORDER["item"]}:
        raise Stop(f"that is not the button: {sent['value']}")
    why = "Can it be clicked? To hover needs the same of a page, and puts nothing into the cart."
    await agent.read(why, "act", run_id=run_id, actions=[{"op": "hover", "locator": locator}])
    edit(agent, error, name)
    run = await agent.call(
        "Go on, with the code as it is now. What is finished is not done again.",
        *("resume", *SUMMARY, "patch", "changed_steps"),
        run_id=run_id,
        wait_s=WAIT,
    )
    if run["status"] != "waiting-approval" or not run.get("patch"):
        raise Stop(f"the run should ask for an approval now and show a patch, and is {run['status']}")
    if changed := run.get("changed_steps"):
        raise Stop(f"no finished step was edited, and the answer names {changed}")
    request = run["pending"][0]["request_id"]
    await agent.call("Approve. The run goes on by itself.", "approve", *SUMMARY, request_id=request, wait_s=WAIT)
    show = ("status", "output", "steps", "attempt")
    return await agent.call("What came of it?", "get_run", *show, run_id=run_id, wait_s=WAIT)


def edit(agent: Mender, error: dict[str, Any], name: str) -> None:
    """Mend the line that the error names, and show the edit."""
    file = Path(error["file"])
    lines = file.read_text().splitlines(keepends=True)
    old = lines[error["line"] - 1]
    lines[error["line"] - 1] = new = old.replace(OLD_LABEL.decode(), name)
    if new == old:
        raise Stop(f"{file}:{error['line']} does not hold the old name: {old.strip()}")
    file.write_text("".join(lines))
    agent.console.print(f"\nThe agent edits {file.name}:{error['line']}", style="bold", highlight=False)
    for sign, line, style in (("-", old, "red"), ("+", new, "green")):
        agent.console.print(f"   {sign} {line.strip()}", style=style, markup=False, highlight=False, soft_wrap=True)


def show_end(agent: Mender, run: dict[str, Any], calls: int, url: str) -> None:
    """Print the receipt and what the shop counted; raises `Stop` unless everything was done well, and once."""
    if run["status"] != "finished":
        raise Stop(f"the run is {run['status']}: {json.dumps(run.get('error'), indent=2)}")
    forms, orders = fetched(f"{url}/forms.json"), fetched(f"{url}/orders.json")["orders"]
    counted = ", ".join(f"{form} {times}" for form, times in forms.items())
    agent.console.print(f"\nThe shop counted its forms: {counted}", markup=False, highlight=False)
    if forms != ONCE:
        raise Stop(f"every form should have been sent once: {forms}")
    receipt = run["output"]
    if [(order["number"], order["items"], order["total"]) for order in orders] != [
        (receipt["number"], {ORDER["item"]: ORDER["quantity"]}, TOTAL)
    ]:
        raise Stop(f"the receipt {receipt} does not fit the orders {orders}")
    if calls > MOST_CALLS:
        raise Stop(f"it took {calls} calls from the failure to the end, and may take {MOST_CALLS}")
    agent.console.print(f"Receipt {receipt['number']}: {receipt['item']}, {receipt['total']}", style="bold green")
    agent.console.print(f"{calls} calls from the failure to the end", style="bold green", highlight=False)


async def attempt(agent: Mender, url: str) -> str:
    """What went wrong; nothing, if the run was repaired."""
    try:
        run = await fail(agent, url)
        before = agent.calls
        run = await repair(agent, run["run_id"])
        show_end(agent, run, agent.calls - before, url)
    except Stop as stop:
        return str(stop)
    return ""


def copy_workflow(folder: Path) -> None:
    """Put `buy` into `folder`, so that it can be edited there."""
    source = (EXAMPLES / "shop" / "buy.py").read_text()
    if source.count(CLICK) != 1:
        raise RuntimeError("examples/shop/buy.py no longer has the click that this demo is about")
    folder.mkdir()
    (folder / "buy.py").write_text(source.replace(CLICK, CLICK.replace("click()", HURRIED_CLICK)))


async def main() -> int:
    """Run the demo; returns the exit status."""
    import anyio
    from mcp import Client, StdioServerParameters
    from rich.console import Console

    console = Console()
    problem = f"it was not done in {SECONDS} seconds"
    with tempfile.TemporaryDirectory(prefix="mcp-flow-repair-") as scratch:
        home, workflows = Path(scratch, "home"), Path(scratch, "workflows")
        copy_workflow(workflows)
        command = [sys.executable, "-m", "mcp_flow"]
        arguments = [*command[1:], "serve", "--home", str(home), "--workflows", str(workflows)]
        environment = {"MCP_FLOW_LOG": "warning", **os.environ}
        server = StdioServerParameters(command=command[0], args=arguments, env=environment)
        try:
            with changed_shop() as url, anyio.move_on_after(SECONDS):
                async with Client(server) as client:
                    problem = await attempt(Mender(client, console), url)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.run_process([*command, "stop", "--home", str(home)], check=False)
    if problem:
        console.print(f"\nThe demo failed: {problem}", style="bold red", markup=False, highlight=False)
    return 1 if problem else 0


if __name__ == "__main__":
    import asyncio

    sys.exit(asyncio.run(main()))
