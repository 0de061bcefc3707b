"""`make soak`: many runs on one home folder, whose servers and workers are killed at random until everything is done.

    tests/soak.py [--runs 200] [--workers 5] [--servers 2] [--seconds 150] [--limit 300] [--pages 10] [--seed N]

The parameters may also come from the environment: SOAK_RUNS, SOAK_SEED and so on; `--keep` leaves the folder.

For a bounded time processes are killed, stopped and told to end, the browser host now and then as well. Then nothing
is killed any more, and every run must finish with the right result, each effect of a `once` step exactly once, the hash
chains whole, and nothing left behind after `mcp-flow stop`. Exits with 1 and says what is wrong otherwise. The seed
decides who is struck and when; what a process is doing at that moment, it can't decide.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import anyio
from mcp import Client, StdioServerParameters

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings
from mcp_flow.store import Store

CALL_SECONDS = 60.0
PACE = (0.5, 2.0)
"""Seconds between two strikes, at least and at most."""
LEASE = 4.0
KILLED = "workers killed"
DEEDS = {
    KILLED: ("worker", signal.SIGKILL, 55),
    "workers stopped": ("worker", signal.SIGSTOP, 8),
    "workers told to end": ("worker", signal.SIGTERM, 12),
    "servers killed": ("server", signal.SIGKILL, 20),
    "hosts killed": ("host", signal.SIGKILL, 5),
}
"""What strikes, and how often in relation to the others."""

PAGE = b"<title>soak</title><h1>soak</h1>"
WORKFLOWS = '''
import asyncio, os
from pathlib import Path
from mcp_flow import Flow, workflow

def did(folder, run_id, what):
    """An effect that no journal knows of: a line in a file, written at once."""
    file = os.open(Path(folder) / run_id, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{what}\\n".encode())
    os.close(file)


async def work(folder, run_id, what, value, seconds) -> int:
    await asyncio.sleep(seconds)
    did(folder, run_id, what)
    await asyncio.sleep(seconds)
    return value


def work_in_a_thread(folder, run_id, what, value) -> int:
    did(folder, run_id, what)
    return value


async def turn(page, folder, run_id, what, value) -> int:
    """Move the page on; it must be where the step before, or a try of this one, has left it."""
    before = int((await page.evaluate("location.hash")).removeprefix("#") or 0)
    assert before in (value - 10, value), f"{what}: the page is at {before}"
    await page.evaluate("value => { location.hash = value }", str(value))
    did(folder, run_id, what)
    return value


@workflow
async def errand(flow: Flow, folder: str, number: int, url: str) -> int:
    pause, me = (number % 7) / 50, flow.run_id
    total = await flow.step("fetch", work, folder, me, "fetch", number, pause)
    total += await flow.step("sort", work_in_a_thread, folder, me, "sort", 10)
    total += await flow.step("pay", work, folder, me, "pay", 100, 0.05 + pause, once=True)
    branches = [flow.step(f"pack {n}", work, folder, me, f"pack {n}", 1, pause) for n in range(3)]
    total += sum(await asyncio.gather(*branches))
    if await flow.approve("ship?", data={"total": total}):
        total += await flow.step("ship", work, folder, me, "ship", 1000, 0.05 + pause, once=True)
    if number % 3 == 0:
        total += await flow.ask("how many?", int)
    total += await flow.step("file", work, folder, me, "file", 10000, pause)
    return total


@workflow
async def visit(flow: Flow, folder: str, number: int, url: str) -> int:
    me = flow.run_id
    page = await flow.page()
    await flow.step("open", page.goto, url)
    total = 0
    for n in range(1, 5):
        total += await flow.step(f"turn {n}", turn, page, folder, me, f"turn {n}", n * 10)
        if n == 2:
            await flow.approve("turn on?")
    total += await flow.step("pay", work, folder, me, "pay", 100, 0.05, once=True)
    title = await flow.step("title", page.title)
    return total + number + len(title)
'''


@dataclass(frozen=True)
class Plan:
    """How much is run, and for how long it is struck at."""

    runs: int
    workers: int
    servers: int
    seconds: float
    limit: float
    pages: int
    seed: int

    def workflow(self, number: int) -> str:
        """What a run is a run of: every so many use a page."""
        return "visit" if self.pages and number % self.pages == 0 else "errand"

    def result(self, number: int) -> int:
        """What a run must come to."""
        if self.workflow(number) == "visit":
            return 10 + 20 + 30 + 40 + 100 + number + len("soak")
        return number + 10 + 100 + 3 + 1000 + 10000 + (7 if number % 3 == 0 else 0)

    def once(self, number: int) -> set[str]:
        """The steps whose effect must be there exactly once."""
        return {"pay"} if self.workflow(number) == "visit" else {"pay", "ship"}


class Soak:
    """The clients, the hands that start and strike, and what they have seen."""

    def __init__(self, plan: Plan, settings: Settings, log: IO[bytes]) -> None:
        self.log = log
        self.plan = plan
        self.settings = settings
        self.effects = settings.home.parent / "effects"
        self.count: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._random = random.Random(plan.seed)
        self._environment = os.environ | settings.environment()
        self._to_start = deque(range(plan.runs))
        self._left = set(range(plan.runs))
        self._servers: dict[int, int] = {}
        self._striking = True
        self._stopped: set[int] = set()
        self._killed: set[int] = set()
        self._began = time.monotonic()
        self._url = ""

    async def run(self) -> None:
        """Everything, in order."""
        began = self._began = time.monotonic()
        try:
            site = await asyncio.start_server(_serve_page, "127.0.0.1", 0)
            self._url = f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/"
            with anyio.move_on_after(self.plan.limit) as bound:
                async with anyio.create_task_group() as tasks:
                    for number in range(self.plan.servers):
                        tasks.start_soon(self._serve, number)
                    for _ in range(self.plan.workers):
                        tasks.start_soon(self._work)
                    tasks.start_soon(self._strike)
            if bound.cancelled_caught:
                self.wrong.append(f"{len(self._left)} runs had not finished after {self.plan.limit:.0f} s")
            self.count["seconds"] = round(time.monotonic() - began)
            await self._judge()
        finally:
            with anyio.CancelScope(shield=True):
                self._continue_all()
                await self._tidy()

    # --- clients ---

    async def _serve(self, number: int) -> None:
        """A client and its server, and another server when that is gone, until every run has finished."""
        while self._left:
            mark = f"{number}-{secrets.token_hex(4)}"
            server = StdioServerParameters(
                command=sys.executable,
                args=["-m", "mcp_flow", "serve"],
                env=self._environment | {"SOAK_SERVER": mark},
            )
            try:
                async with Client(server) as client:
                    self._servers[number] = next(iter(_mentioning(mark)), 0)
                    await self._attend(client)
            except Exception as error:  # the boundary: a server that was killed ends in many ways
                if number in self._servers and self._servers[number] not in self._killed:
                    self.wrong.append(f"client {number}: {_flat(error)}")
                self.count["clients that lost their server"] += 1
            finally:
                self._servers.pop(number, None)

    async def _attend(self, client: Client) -> None:
        """What an agent does: start runs, answer what they ask, look after those that failed."""
        while self._left:
            while self._to_start and self._is_time_for_another():
                number = self._to_start.popleft()
                try:
                    given = {"folder": str(self.effects), "number": number, "url": self._url}
                    await self._call(
                        client,
                        "start_run",
                        workflow=self.plan.workflow(number),
                        input=given,
                        run_id=f"run-{number}",
                        wait_s=0,
                    )
                except BaseException:
                    self._to_start.append(number)
                    raise
            pending = await self._call(client, "list_pending", limit=50)
            for request in self._shuffled(pending["requests"]):
                await self._answer(client, request)
            for run in (await self._call(client, "list_runs", status=["failed", "cancelled"], limit=200))["runs"]:
                await self._mend(client, run)
            await self._note_finished(client)
            if self._left and not self._to_start and not pending["requests"]:
                number = self._random.choice(sorted(self._left))
                await self._call(client, "get_run", run_id=f"run-{number}", wait_s=1)

    def _is_time_for_another(self) -> bool:
        """Runs are started evenly, so that there is something to strike at for as long as it is struck at."""
        passed = (time.monotonic() - self._began) / self.plan.seconds
        return self.plan.runs - len(self._to_start) <= passed * self.plan.runs

    async def _answer(self, client: Client, request: dict[str, Any]) -> None:
        request_id, run_id = request["request_id"], request["run_id"]
        match request["kind"]:
            case "approval":
                await self._call(client, "approve", request_id=request_id, wait_s=0)
            case "input":
                await self._call(client, "resume", run_id=run_id, request_id=request_id, value=7, wait_s=0)
            case "in-doubt":
                step = request["step"].partition("#")[0]
                done = self._did(run_id)[step]
                choice = {"step": "done", "value": 1000 if step == "ship" else 100} if done else {"step": "again"}
                found = await self._call(client, "resume", run_id=run_id, request_id=request_id, wait_s=0, **choice)
                if "refused" not in found:
                    self.count[f"in doubt: {choice['step']}"] += 1
            case kind:
                self.wrong.append(f"{run_id} asks for {kind}: {request}")

    async def _mend(self, client: Client, run: dict[str, Any]) -> None:
        """Runs whose workers or pages died three times at one place fail on purpose; anything else is wrong."""
        seen = await self._call(client, "get_run", run_id=run["run_id"])
        if seen.get("status") != "failed":
            if seen.get("status") == "cancelled":
                self.wrong.append(f"{run['run_id']} is cancelled")
            return
        kind = seen["error"]["type"]
        self.count[f"failed: {kind}"] += 1
        innocent = kind == "WorkerCrashed" or "lost 3 times in a row" in seen["error"]["message"]
        if not innocent:
            self.wrong.append(f"{run['run_id']} failed: {seen['error']}")
        await self._call(client, "resume", run_id=run["run_id"], wait_s=0)

    async def _note_finished(self, client: Client) -> None:
        cursor: dict[str, str] = {}
        while True:
            page = await self._call(client, "list_runs", status=["finished"], limit=200, **cursor)
            self._left -= {int(run["run_id"].removeprefix("run-")) for run in page["runs"]}
            if not page.get("cursor"):
                return
            cursor = {"cursor": page["cursor"]}

    async def _call(self, client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
        with anyio.fail_after(CALL_SECONDS):
            result = await client.call_tool(tool, arguments)
        self.count["calls"] += 1
        if not result.is_error:
            found: dict[str, Any] = result.structured_content or {}
            return found
        text = result.content[0].text
        # The other client was faster.
        if tool in ("approve", "resume") and any(
            word in text for word in ("already", "withdrawn", "no longer", "finished")
        ):
            self.count["answers that came second"] += 1
        elif tool == "get_run" and "There is no run" in text:
            # The other client is starting it, or its server died over that; one that never comes is missed at the end.
            self.count["runs looked for too soon"] += 1
        else:
            self.count["refusals"] += 1
            self.wrong.append(f"{tool}({arguments}): {text}")
        return {"refused": text}

    # --- hands ---

    async def _work(self) -> None:
        """A worker started by hand, and the next one when it is gone, for as long as they are struck at."""
        while self._striking and self._left:
            self.count["workers started by hand"] += 1
            process = await anyio.open_process(
                [sys.executable, "-P", "-m", "mcp_flow", "worker"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
            )
            await process.wait()

    async def _strike(self) -> None:
        """Strike for so many seconds from when there is a worker, and at one first: it would show nothing otherwise."""
        while self._left and not _workers(self.settings):
            await anyio.sleep(0.05)
        until = time.monotonic() + self.plan.seconds
        while self._left and time.monotonic() < until:
            await anyio.sleep(self._random.uniform(*PACE))
            shares = [share for _, _, share in DEEDS.values()]
            [deed] = self._random.choices(list(DEEDS), shares) if self.count[KILLED] else [KILLED]
            kind, number, _ = DEEDS[deed]
            victims = {
                "server": sorted(pid for pid in self._servers.values() if pid),
                "worker": _workers(self.settings),
                "host": [host.pid for host in hosts.living(self.settings)],
            }[kind]
            if not victims:
                continue
            pid = self._random.choice(victims)
            self._killed |= {pid} if number == signal.SIGKILL else set()
            if _signal(pid, number):
                self.count[deed] += 1
            if number == signal.SIGSTOP:
                self._stopped.add(pid)
            elif self._stopped and self._random.random() < 0.3:
                _signal(self._stopped.pop(), signal.SIGCONT)
        self._continue_all()
        self._striking = False
        self.count["runs left when the strikes ended"] = len(self._left)

    def _continue_all(self) -> None:
        while self._stopped:
            _signal(self._stopped.pop(), signal.SIGCONT)

    def _shuffled(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._random.sample(found, len(found))

    def _did(self, run_id: str) -> Counter[str]:
        path = self.effects / run_id
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    # --- judgement ---

    async def _judge(self) -> None:
        async with Store(self.settings, "soak") as store:
            for number in range(self.plan.runs):
                try:
                    await self._judge_run(store, number)
                except Exception as error:  # what is wrong with one run must not hide the others
                    self.wrong.append(f"run-{number}: {_flat(error)}")

    async def _judge_run(self, store: Store, number: int) -> None:
        run_id = f"run-{number}"
        self.count["events"] += await store.verify(run_id)
        run = await store.run(run_id)
        self.count["attempts"] += run.attempt
        self.count[f"page {run.page_state}"] += run.page_state is not None
        if run.status != "finished" or run.output != self.plan.result(number):
            self.wrong.append(f"{run_id} is {run.status} with {run.output}, not {self.plan.result(number)}")
        did = self._did(run_id)
        for step in self.plan.once(number):
            if did[step] != 1:
                self.wrong.append(f"{run_id}: step {step} runs once, and did so {did[step]} times")
        passes = 0
        allowed: Counter[str] = Counter()
        for recorded in await store.events(run_id, 0, -1):
            match recorded.event:
                case ev.AttemptStarted():
                    passes += 1
                case ev.StepFinished() as event:
                    allowed[event.key.partition("#")[0]] = passes
        for step, times in did.items():
            self.count["effects"] += times
            self.count["effects done again"] += times - 1
            if times > allowed[step]:
                self.wrong.append(f"{run_id}: step {step} ran {times} times in {allowed[step]} attempts up to its end")

    async def _tidy(self) -> None:
        """End everything as a user would, and see what is left."""
        stopped = await anyio.run_process(
            [sys.executable, "-m", "mcp_flow", "stop"], env=self._environment, check=False
        )
        if stopped.returncode:
            self.wrong.append(f"mcp-flow stop: {stopped.stdout.decode()}{stopped.stderr.decode()}")
        with anyio.move_on_after(10):
            while _mentioning(str(self.settings.home)):
                await anyio.sleep(0.05)
        self.wrong += [f"left running: {what}" for what in _mentioning(str(self.settings.home)).values()]
        self.wrong += _left_behind(self.settings)


def _left_behind(settings: Settings) -> list[str]:
    """Temporary folders of hosts, sockets, and life locks."""
    found = []
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        folder = Path(os.environ[name])
        left = [path for path in folder.rglob("mcp-flow-*/**/*") if not path.is_dir()]
        # What belongs to the user is one folder for each; a host's ends in letters.
        left += [path for path in folder.glob("mcp-flow-*") if path.name != f"mcp-flow-{os.getuid()}"]
        found += [f"left in {name}: {path}" for path in left]
    return [*found, *(f"left in workers/: {path.name}" for path in (settings.home / "workers").glob("*"))]


async def _serve_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The one page that there is, on whatever connections a browser makes and drops."""
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(PAGE) + PAGE)
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


def _workers(settings: Settings) -> list[int]:
    """The processes that execute runs."""
    found = []
    for worker in presence.living(settings):
        try:
            found.append(int((settings.home / "workers" / f"{worker}.lock").read_text()))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _mentioning(mark: str) -> dict[int, str]:
    """The living processes, but for this one, whose command or environment holds this text."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(folder.name) != os.getpid() and mark.encode() in said and not _is_gone(int(folder.name)):
            found[int(folder.name)] = said.replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def _flat(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_flat, error.exceptions))
    return f"{type(error).__name__}: {error}"


def main() -> int:
    """Soak, and say what came of it."""
    parser = argparse.ArgumentParser(description="Kill servers and workers at random; everything must finish.")
    defaults: dict[str, tuple[Callable[[str], Any], Any]] = {
        "runs": (int, 200),
        "workers": (int, 5),
        "servers": (int, 2),
        "seconds": (float, 150),
        "limit": (float, 300),
        "pages": (int, 10),
        "seed": (int, None),
    }
    for name, (kind, default) in defaults.items():
        given = os.environ.get(f"SOAK_{name.upper()}")
        parser.add_argument(f"--{name}", type=kind, default=kind(given) if given else default)
    parser.add_argument("--keep", action="store_true", help="leave the folder for whoever wants to look")
    given_ = vars(parser.parse_args())
    keep = given_.pop("keep")
    plan = Plan(**given_ | {"seed": given_["seed"] if given_["seed"] is not None else secrets.randbelow(10**6)})
    # A short path, because that of a socket is limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        (folder / name.lower()[:3]).mkdir()
        os.environ[name] = str(folder / name.lower()[:3])
    tempfile.tempdir = None
    print(f"soak: {json.dumps(vars(plan))}", flush=True)
    settings = config.load(
        home=folder / "home",
        workflows=folder / "workflows",
        worker_idle=3,
        lease=LEASE,
        grace=3,
        hold=2,
        allow_origins=["http://127.0.0.1:*"],
    )
    log = (folder / "workers.log").open("ab")
    soak = Soak(plan, settings, log)
    soak.effects.mkdir()
    settings.workflows.mkdir()
    (settings.workflows / "soaked.py").write_text(WORKFLOWS)
    try:
        anyio.run(soak.run)
    finally:
        log.close()
        for what, count in sorted(soak.count.items()):
            print(f"  {count:6} {what}")
        for what in soak.wrong:
            print(f"WRONG {what}")
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("soak: " + (f"{len(soak.wrong)} things are wrong" if soak.wrong else "all is well"))
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
