"""Which workflows there are: read from their files in a child, so that none of them is ever imported here."""

from __future__ import annotations

import base64
import difflib
import json
import math
import re
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.abc
import anyio.to_thread

from mcp_flow.config import Settings
from mcp_flow.errors import BrokenWorkflow, FlowError, InvalidInput, UnknownWorkflow
from mcp_flow.revisions import Revision, capture, find_files, source_line

HEADER = struct.Struct("!d")
VERDICT = b"\nverdict "
"""How `reader` is spoken to: a time limit goes with a request's socket, a verdict ends its answer."""

_AT_ONCE = 4
_FORGET_HANG = 60.0
_SLACK = 20.0


@dataclass(frozen=True)
class Description:
    """What is known of a workflow without running it. `function` is its name in its file, `name` the one to call."""

    name: str
    function: str
    description: str
    file: str
    line: int
    input_schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    steps: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class BrokenFile:
    """A file that can't be read; the error holds file and line."""

    file: str
    error: str


@dataclass(frozen=True)
class Catalog:
    """All workflows by the names that call them, and the files that can't be read."""

    workflows: dict[str, Description]
    broken: list[BrokenFile]


class Reader:
    """Reads workflow files in a child that it starts when needed; an async context manager.

    What a file holds is kept by content hash, so an unchanged file is read once.
    """

    def __init__(self, settings: Settings, *, limit: float = 10.0) -> None:
        self._root = settings.workflows
        self._limit = limit
        self._at_once = anyio.CapacityLimiter(_AT_ONCE)
        self._kept: dict[str, _Reading] = {}
        self._child: _Child | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def warm(self) -> None:
        """Starts the child and returns when it answers, so that the first read need not wait for it."""
        await self._ask(Revision(str(self._root), "warm", {"warm": b""}, "warm"))

    async def aclose(self) -> None:
        """Ends the child."""
        child, self._child = self._child, None
        if child is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(child.end)

    async def catalog(self) -> Catalog:
        """Every workflow under the workflows folder, as its file is now."""
        readings = await self._read(b"workflow")
        workflows = {described.name: described for described, _ in _name(readings)}
        broken = [BrokenFile(reading.file, error) for reading in readings for error in reading.broken]
        return Catalog(dict(sorted(workflows.items())), broken)

    async def describe(self, name: str) -> tuple[Description, Revision]:
        """The workflow of this name, or `file:function`, and its code as it is now on disk.

        Raises `UnknownWorkflow`, or `BrokenWorkflow` when the file that defines it can't be read.
        """
        file, _, function = name.rpartition(":")
        file = file.removesuffix(".py")
        # A file without the name's letters can't define it; the others need not be read, nor waited for.
        readings = await self._read(b"workflow", function.encode("utf-8", "replace"))
        found = [
            (described, revision)
            for described, revision in _name(readings)
            if described.function == function and file in ("", _stem(revision))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(described.name for described, _ in found)
            raise UnknownWorkflow(f"Several files have a workflow {name!r}; say which: {names}.")
        for reading in readings:
            if reading.broken and reading.defines(function) and file in ("", _stem(reading.revision)):
                raise BrokenWorkflow(
                    f"Workflow {name!r} can't be read. Mend its file and call again: {' '.join(reading.broken)}"
                )
        raise _unknown(name, self._root, await self.catalog())

    async def check(self, revision: Revision) -> list[str]:
        """The names of the workflows in a revision; raises `BrokenWorkflow` for one that can't be imported."""
        answer = await self._ask(revision)
        if broken := answer.get("broken"):
            raise BrokenWorkflow(" ".join(broken))
        return [found["function"] for found in answer.get("workflows", [])]

    async def validate(self, revision: Revision, function: str, input: Any) -> dict[str, Any]:
        """The input of one of a revision's workflows in its normal form; raises `InvalidInput`, `BrokenWorkflow`."""
        answer = await self._ask(revision, function=function, input=input)
        if "invalid" in answer:
            raise InvalidInput(answer["invalid"], answer["problems"])
        if "broken" in answer:
            raise BrokenWorkflow(" ".join(answer["broken"]))
        normal: dict[str, Any] = answer["input"]
        return normal

    async def _read(self, *words: bytes) -> list[_Reading]:
        """The readings of the files that hold these words, in the order of their names."""
        captured = await anyio.to_thread.run_sync(_capture_all, self._root, words)
        readings: dict[int, _Reading] = {}

        async def read(index: int, revision: Revision) -> None:
            kept = self._kept.get(revision.hash)
            if kept is None or anyio.current_time() >= kept.until:
                answer = await self._ask(revision)
                kept = _Reading(revision, answer.get("workflows", []), answer.get("broken", []))
                if answer.get("hung"):
                    kept = replace(kept, until=anyio.current_time() + _FORGET_HANG)
                if answer.get("hung") or not kept.broken:
                    self._kept[revision.hash] = kept
            readings[index] = kept

        async with anyio.create_task_group() as group:
            for index, revision in enumerate(captured):
                if isinstance(revision, _Reading):
                    readings[index] = revision
                else:
                    group.start_soon(read, index, revision)
        return [readings[index] for index in range(len(captured))]

    # --- the child ---

    async def _ask(self, revision: Revision, **request: Any) -> dict[str, Any]:
        """The child's answer to one request; `broken` when the file exits, crashes or does not end."""
        files = {name: base64.b64encode(content).decode() for name, content in revision.files.items()}
        request |= {"root": revision.root, "entry": revision.entry, "hash": revision.hash, "files": files}
        try:
            text = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"The input is not JSON: {error}.") from error
        async with self._at_once:
            for _ in range(2):
                child = self._start()
                with suppress(anyio.BrokenResourceError, OSError):
                    if (reply := await self._exchange(child, text)) is not None:
                        return _understand(revision, *reply, self._limit)
                # Another request may have replaced it already.
                if self._child is child:
                    self._child = None
                child.kill()
        raise FlowError("The child that reads workflow files does not answer; the log says why. Call again.")

    async def _exchange(self, child: _Child, text: bytes) -> tuple[bytes, dict[str, Any]] | None:
        """What a fork answered and how it ended; None when the child was lost meanwhile."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(child.control, [HEADER.pack(self._limit)], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        received = b""
        async with await anyio.abc.UNIXSocketStream.from_socket(ours) as stream:
            with anyio.move_on_after(self._limit + _SLACK):
                await stream.send(text)
                await stream.send_eof()
                with suppress(anyio.EndOfStream):
                    while True:
                        received += await stream.receive()
                        body, mark, verdict = received.rpartition(VERDICT)
                        if mark and verdict.endswith(b"\n"):
                            return body, json.loads(verdict)
        return None

    def _start(self) -> _Child:
        if self._child is None:
            self._child = _Child.start()
        return self._child


@dataclass(frozen=True)
class _Child:
    """A running `reader` and the socket that is its stdin; it ends when that is closed."""

    process: subprocess.Popen[bytes]
    control: socket.socket

    @classmethod
    def start(cls) -> _Child:
        ours, theirs = socket.socketpair()
        ours.settimeout(1.0)
        # The server's own import path, whichever way the server was started, and not the current folder:
        # a file called random.py in it would be taken for the library's.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mcp_flow.reader import main; main()"
        with theirs:
            command = [sys.executable, "-P", "-c", code]
            return cls(subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL), ours)

    def end(self) -> None:
        self.control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class _Reading:
    """What the child made of one revision; it is read again `until` then, on anyio's clock."""

    revision: Revision
    found: list[dict[str, Any]]
    broken: list[str]
    until: float = math.inf

    @property
    def file(self) -> str:
        return self.revision.path

    def defines(self, function: str) -> bool:
        """Whether a workflow of this name seems to stand in the file, going by its text."""
        name = re.escape(function).encode()
        source = self.revision.files.get(self.revision.entry, b"")
        return re.search(rb"\bdef\s+%b\b|name\s*=\s*[\"']%b[\"']" % (name, name), source) is not None


def _capture_all(root: Path, words: tuple[bytes, ...]) -> list[Revision | _Reading]:
    captured: list[Revision | _Reading] = []
    for path in find_files(root):
        entry = path.relative_to(root).as_posix()
        try:
            source = path.read_bytes()
            if all(word in source for word in words):
                captured.append(capture(root, entry))
        except (OSError, BrokenWorkflow) as error:
            broken = Revision(str(root), entry, {}, "")
            captured.append(_Reading(broken, [], [f"{path}:1: the file can't be read: {error}"]))
    return captured


def _name(readings: Iterable[_Reading]) -> list[tuple[Description, Revision]]:
    """Every workflow found, named by its function, or by file and function where files share it."""
    found = [(reading.revision, raw) for reading in readings for raw in reading.found]
    count = Counter(raw["function"] for _, raw in found)
    return [
        (
            Description(
                name=raw["function"] if count[raw["function"]] == 1 else f"{_stem(revision)}:{raw['function']}",
                file=revision.path,
                **raw,
            ),
            revision,
        )
        for revision, raw in found
    ]


def _stem(revision: Revision) -> str:
    return revision.entry.removesuffix(".py")


def _unknown(name: str, root: Path, catalog: Catalog) -> UnknownWorkflow:
    known = list(catalog.workflows)
    text = f"There is no workflow {name!r}. "
    if close := difflib.get_close_matches(name, known, n=3):
        text += f"Did you mean {' or '.join(close)}? "
    text += f"Known: {', '.join(known)}." if known else f"No file under {root} holds one."
    if catalog.broken:
        errors = "".join(f"\n- {broken.error}" for broken in catalog.broken)
        text += f" It may be in a file that can't be read:{errors}"
    return UnknownWorkflow(text)


def _understand(revision: Revision, body: bytes, verdict: dict[str, Any], limit: float) -> dict[str, Any]:
    """The fork's answer; where it left none, what the verdict and its last traceback say happened."""
    if verdict["status"] == 0 and (start := body.find(b"{")) >= 0:
        answer: dict[str, Any] = json.loads(body[start:])
        return answer
    line, source = _last_place(revision, body.decode("utf-8", "replace"))
    at = f"; it stands at `{source}`" if source and verdict["late"] else ""
    if verdict["late"]:
        return {"broken": [f"{line}: it did not import within {limit:g} s{at}. Nothing may block there."], "hung": True}
    if verdict["status"] < 0:
        return {"broken": [f"{line}: it crashed at import with {signal.Signals(-verdict['status']).name}."]}
    return {"broken": [f"{line}: it ended its process at import with status {verdict['status']}."]}


def _last_place(revision: Revision, dump: str) -> tuple[str, str | None]:
    """File, line and source where a thread stood in the revision's own code, the main thread first."""
    threads = dump.split("most recent call first")
    for thread in reversed(threads):
        for file, line in re.findall(r'File "(.+?)", line (\d+)', thread):
            if (source := source_line(revision, file, int(line))) is not None:
                return f"{file}:{line}", source.strip()
    return f"{revision.path}:1", None
