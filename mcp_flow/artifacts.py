"""The files of a run: what it attached, downloaded, and what its page showed when it stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

from mcp_flow import events as ev
from mcp_flow.config import Settings, private_folder
from mcp_flow.pages import Pages

Append = Callable[[ev.Event], Awaitable[None]]


class Artifacts:
    """Writes files into the run's folder, and each into its journal with its size and hash."""

    def __init__(self, settings: Settings, run_id: str, pages: Pages, append: Append) -> None:
        self._settings = settings
        self._run_id = run_id
        self._pages = pages
        self._append = append

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return private_folder(self._settings.run_folder(self._run_id))

    async def keep(self, name: str, content: bytes, key: str | None = None) -> str:
        """Write a file, and journal it under the key of what gave it."""
        path = self.folder / name
        await anyio.to_thread.run_sync(_write_private, path, content)
        digest = hashlib.sha256(content).hexdigest()
        await self._append(ev.ArtifactKept(file=name, size=len(content), sha256=digest, key=key))
        return str(path)

    async def keep_evidence(self, moment: str, secrets: Sequence[str]) -> list[str]:
        """A picture and a record of the page as it is, without `secrets`, as far as there is a page."""
        image, text = await self._pages.evidence(secrets)
        kept = []
        with suppress(OSError):  # evidence must not hide the failure that it is about
            if image:
                kept.append(await self.keep(f"{moment}.png", image))
            if text:
                kept.append(await self.keep(f"{moment}.txt", text.encode("utf-8", "replace")))
        return kept

    async def downloaded(self, path: Path) -> ev.ArtifactKept:
        """The event that says of a download that it is there; raises `OSError` where it is not any more."""
        content = await anyio.to_thread.run_sync(path.read_bytes)
        file = path.relative_to(self.folder).as_posix()
        return ev.ArtifactKept(file=file, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
