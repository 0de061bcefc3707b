"""`make demo`: an agent buys a teapot, and stops to ask before it pays. Everything shown came over MCP.

It starts the demo shop on loopback and `mcp-flow serve` as an MCP client would, over stdio, with a home folder of its
own that is kept. Exits with 0 only if the receipt came.
"""

# Imports of weight stand inside the functions: this file lies among the workflows, and mcp-flow reads those.
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp import Client
    from rich.console import Console

EXAMPLES = Path(__file__).resolve().parent
ENOUGH_LINES = 40
ENOUGH_CHARACTERS = 200
SHORT = 66
SECONDS = 120
SUMMARY = ("run_id", "status", "why", "error", "page", "next")


class Stop(Exception):
    """The demo can't go on; the message says why."""


def laid_out(value: Any, depth: int = 2) -> Any:
    """`value` for a reader: one field a line as deep as `depth`, JSON below that, cut visibly when long."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if isinstance(value, dict) and not any(isinstance(part, dict | list) for part in value.values()):
        line = ", ".join(
            f"{name} {part if isinstance(part, str) else json.dumps(part)}" for name, part in value.items()
        )
        if len(line) < SHORT:
            return Text(line)
    if depth and isinstance(value, dict):
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, part in value.items():
            table.add_row(name, laid_out(part, depth - 1))
        return table
    if depth and isinstance(value, list) and value and isinstance(value[0], dict):
        items = [laid_out(item, depth) for item in value]
        return Group(
            *(item if isinstance(item, Text) else Padding(item, (0, 0, 1, 0)) for item in items[:-1]), items[-1]
        )
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if cut := max(0, len(text) - ENOUGH_CHARACTERS):
        text = f"{text[:ENOUGH_CHARACTERS]} [... {cut} more characters]"
    return Text(text)


class Agent:
    """An MCP client that shows each of its calls and what came back."""

    def __init__(self, client: "Client", console: "Console") -> None:
        self.client = client
        self.console = console
        self.calls = 0

    async def call(self, why: str, tool: str, *show: str, **arguments: Any) -> dict[str, Any]:
        """The object that `tool` answered; of its fields those named in `show` are printed, or all."""
        result = await self._send(why, tool, arguments)
        answer: dict[str, Any] | None = result.structured_content
        if answer is None:
            raise Stop(f"{tool} answered without structured content")
        self._panel(laid_out({name: answer[name] for name in show or answer if name in answer}))
        return answer

    async def read(self, why: str, tool: str, **arguments: Any) -> None:
        """Show the text that `tool` answered, shortened visibly, and which images came with it."""
        result = await self._send(why, tool, arguments)
        text = "\n".join(block.text for block in result.content if block.type == "text")
        lines = text.splitlines()
        shown = lines[:ENOUGH_LINES]
        if rest := len(lines) - len(shown):
            shown.append(f"[... {rest} more lines; {len(text)} characters in all]")
        shown += [f"[an image, {block.mime_type}]" for block in result.content if block.type == "image"]
        self._panel("\n".join(shown))

    async def _send(self, why: str, tool: str, arguments: dict[str, Any]) -> Any:
        self.calls += 1
        self.console.print()
        self.console.print(f"{self.calls}. {why}", style="bold", markup=False, highlight=False)
        given = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
        self.console.print(f"   {tool}({given})", style="cyan", markup=False, highlight=False, soft_wrap=True)
        result = await self.client.call_tool(tool, arguments)
        if result.is_error:
            raise Stop(f"{tool} answered with an error:\n{''.join(getattr(b, 'text', '') for b in result.content)}")
        return result

    def _panel(self, content: Any) -> None:
        from rich.panel import Panel
        from rich.text import Text

        body = Text(content, overflow="fold") if isinstance(content, str) else content
        self.console.print(Panel(body, border_style="dim", padding=(0, 1)))


async def buy_a_teapot(agent: Agent, url: str) -> dict[str, Any]:
    """The conversation; returns the run as it was when it ended."""
    await agent.call("Which workflows are there?", "list_workflows", "workflows", "folder")
    order = {"item": "Teapot", "quantity": 2, "url": url}
    run = await agent.call(
        "Start one. It drives a real browser, and comes back when it stops or ends.",
        "start_run",
        *SUMMARY,
        workflow="buy",
        input=order,
    )
    if run["status"] != "waiting-approval":
        raise Stop(f"the run should wait for an approval now, and is {run['status']}; {home_of(run)} is kept")
    run_id = run["run_id"]
    await agent.read("What does its page show at this moment?", "snapshot", run_id=run_id)
    pending = await agent.call("What does it wait for?", "list_pending", "requests", "next", run_id=run_id)
    request = pending["requests"][0]["request_id"]
    run = await agent.call(
        "Approve. The run goes on by itself.", "approve", *SUMMARY, request_id=request, decision="approve"
    )
    while run["status"] in ("queued", "running", "waiting-approval"):
        run = await agent.call("Is it done?", "get_run", *SUMMARY, run_id=run_id, wait_s=20)
    return await agent.call("What came of it, and where is everything kept?", "get_run", run_id=run_id)


def home_of(run: dict[str, Any]) -> Path:
    """The home folder, which holds the folders of all runs."""
    return Path(run["folder"]).parents[1]


def show_end(console: "Console", run: dict[str, Any]) -> None:
    """Print the receipt, and where the journal and the screenshot lie; raises `Stop` when one of them is missing."""
    if run["status"] != "finished":
        raise Stop(f"the run is {run['status']}: {json.dumps(run.get('error'), indent=2)}")
    receipt = run["output"]
    if sorted(receipt) != ["item", "number", "total"]:
        raise Stop(f"that is no receipt: {receipt}")
    folder = Path(run["folder"])
    kept = {"journal": home_of(run) / "flow.db"}
    kept |= {Path(name).name: folder / name for name in run["artifacts"] if name.endswith(".png")}
    console.print()
    console.print(f"Receipt {receipt['number']}: {receipt['item']}, {receipt['total']}", style="bold green")
    for name, path in kept.items():
        if not path.is_file():
            raise Stop(f"{path} should be there and is not")
        console.print(f"{name:12} {path}", markup=False, highlight=False, soft_wrap=True)
    if len(kept) < 2:
        raise Stop("no screenshot was kept")


async def main() -> int:
    """Run the demo; returns the exit status."""
    import anyio
    from mcp import Client, StdioServerParameters
    from rich.console import Console
    from shop.server import shop

    console = Console()
    home = tempfile.mkdtemp(prefix="mcp-flow-demo-")
    here = ["--home", home, "--workflows", str(EXAMPLES)]
    command = [sys.executable, "-m", "mcp_flow"]
    environment = {"MCP_FLOW_LOG": "warning", **os.environ}
    server = StdioServerParameters(command=command[0], args=[*command[1:], "serve", *here], env=environment)
    problem = f"it was not done in {SECONDS} seconds"
    try:
        with shop() as url, anyio.move_on_after(SECONDS):
            async with Client(server) as client:
                problem = await attempt(Agent(client, console), url)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.run_process([*command, "stop", "--home", home], check=False)
    if problem:
        console.print(f"\nThe demo failed: {problem}", style="bold red", markup=False, highlight=False)
    return 1 if problem else 0


async def attempt(agent: Agent, url: str) -> str:
    """What went wrong; nothing, if the receipt came."""
    try:
        show_end(agent.console, await buy_a_teapot(agent, url))
    except Stop as stop:
        return str(stop)
    return ""


if __name__ == "__main__":
    import asyncio

    sys.exit(asyncio.run(main()))
