"""The key under which the state of a question travels through a client, kept over restarts of the server."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from mcp.server.mcpserver import AESGCMRequestStateCodec

from mcp_flow.config import private_folder

LONGEST_THOUGHT = 7 * 86_400.0
"""Seconds that a person may take over a question before it is asked anew."""
_BYTES = 32


class KeptKey:
    """Seals and opens state under the key of a home folder; read, or made, when it is first needed."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def seal(self, payload: bytes) -> str:
        """An opaque token that protects `payload`."""
        return self._codec.seal(payload)

    def unseal(self, token: str) -> bytes:
        """What a token protects; raises `InvalidRequestState`."""
        return self._codec.unseal(token)

    @cached_property
    def _codec(self) -> AESGCMRequestStateCodec:
        path = private_folder(self._home) / "request-state.key"
        if not path.exists() or path.stat().st_size != _BYTES:
            fresh = self._home / f"request-state.{secrets.token_hex(6)}"
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_BYTES))
            if path.exists():  # half of one, of a disk that was full
                fresh.replace(path)
            with suppress(FileExistsError, FileNotFoundError):  # of two servers that make one the first keeps its own
                os.link(fresh, path)
            fresh.unlink(missing_ok=True)
        return AESGCMRequestStateCodec([path.read_bytes()])
