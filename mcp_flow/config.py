"""One frozen settings object: flags win over the environment, the environment over `settings.toml`.

`None` is unset at every level; defaults are applied last, in one place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mcp_flow import rails
from mcp_flow.errors import FlowError, InvalidId, InvalidInput

DEFAULT_HOME = ".mcp-flow"
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are and how long they wait. Durations are seconds.

    `home` holds the journal and everything that belongs to runs; `workflows` is the folder of workflow files.
    """

    home: Path
    workflows: Path
    browser: str | None = None
    viewport: tuple[int, int] = (1366, 768)
    env: Literal["development", "production"] = "development"
    log: Literal["debug", "info", "warning"] = "info"
    worker_idle: float = 30.0
    """How long a worker without work stays."""
    host_idle: float = 1800.0
    """How long a browser host that nobody uses stays."""
    lease: float = 10.0
    """How long a lease's counter may stand still before the lease has expired."""
    blocked: float = 60.0
    """How long a worker's event loop may be blocked before the worker is killed."""
    grace: float = 10.0
    """How long a step in flight may take to end when its attempt is suspended."""
    hold: float = 1800.0
    """How long a run that waits keeps its page."""
    hijack_idle: float = 600.0
    """How long whoever has taken a page may leave it unused."""
    take_up: bool = True
    """Whether runs whose owner has died are taken up by themselves; `resume` does it otherwise."""
    save_workflows: bool = False
    """Whether clients may write workflow files."""
    exec_js: Literal["write", "read", "off"] = "write"
    """What code from clients may do in a page."""
    allow_origins: tuple[str, ...] = ()
    """What pages may reach, private addresses among it; with none every public origin."""
    block_origins: tuple[str, ...] = ()
    """What no page may reach."""
    files: Path | None = None
    """A folder whose files `act` may upload, besides the run's own."""

    @property
    def database(self) -> Path:
        """The journal's file."""
        return self.home / "flow.db"

    @property
    def production(self) -> bool:
        """Whether breakpoints are skipped."""
        return self.env == "production"

    @property
    def runtime(self) -> Path:
        """The folder of this home's sockets: short, because a socket's path is limited to 107 bytes."""
        base = os.environ.get("XDG_RUNTIME_DIR")
        root = Path(base) if base and os.access(base, os.W_OK) else Path(tempfile.gettempdir())
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:12]
        return root / f"mcp-flow-{os.getuid()}" / name

    @property
    def rails(self) -> rails.Rails:
        """What the pages of every run may reach."""
        return rails.Rails.of(self.allow_origins, self.block_origins)

    def upload_folders(self, run_id: str) -> list[Path]:
        """The folders from which `act` may upload files to a page of this run."""
        return [self.run_folder(run_id), *([self.files] if self.files else [])]

    def typed(self, command: str) -> str:
        """`command` as a person types it in a terminal; with the home folder, unless it is the one that is found."""
        elsewhere = "" if self.home == Path(DEFAULT_HOME).resolve() else f" --home {shlex.quote(str(self.home))}"
        return f"mcp-flow {command}{elsewhere}"

    def run_folder(self, run_id: str) -> Path:
        """The folder of one run's artifacts, downloads and logs."""
        return self.home / "runs" / check_id(run_id, "run")

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these same settings."""
        return {
            f"MCP_FLOW_{field.name.upper()}": _as_text(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


def load(**flags: Any) -> Settings:
    """Settings from flags (those that are not None), `MCP_FLOW_*`, `settings.toml` in the home folder, defaults.

    Raises `InvalidInput` naming the setting and the place that a bad value came from.
    """
    given: dict[str, tuple[Any, str]] = {}
    home = flags.get("home") or os.environ.get("MCP_FLOW_HOME") or DEFAULT_HOME
    home = Path(home).expanduser().resolve()
    names = {field.name for field in dataclasses.fields(Settings)}
    file = home / "settings.toml"
    if file.exists():
        try:
            content = tomllib.loads(file.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InvalidInput(f"{file} is not TOML: {error}. Mend it or move it away.") from error
        if unknown := sorted(content.keys() - names):
            raise InvalidInput(f"{file} has unknown settings: {', '.join(unknown)}. Known: {', '.join(sorted(names))}.")
        given |= {name: (value, str(file)) for name, value in content.items()}
    for name in names:
        if value := os.environ.get(f"MCP_FLOW_{name.upper()}"):
            given[name] = (value, f"MCP_FLOW_{name.upper()}")
    given |= {name: (value, f"--{name}") for name, value in flags.items() if value is not None}
    values = {name: _parse(name, value, source) for name, (value, source) in given.items()}
    values["home"] = home
    values["workflows"] = Path(values.get("workflows", "workflows")).expanduser().resolve()
    return Settings(**values)


def check_id(value: str, what: str) -> str:
    """`value`, if it has the form of an id; raises `InvalidId` otherwise. An id is never a path."""
    if not ID_PATTERN.fullmatch(value):
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise InvalidId(
            f"{shown!r} can't be a {what} id: use 1 to 64 letters, digits, dots, dashes and underscores, "
            "the first a letter or a digit."
        )
    return value


def keep_compiled(settings: Settings) -> None:
    """Have this process' Playwright drivers keep what Node.js compiles: the next ones start in two thirds of the time.

    https://nodejs.org/api/module.html#module-compile-cache
    """
    os.environ.setdefault("NODE_COMPILE_CACHE", str(settings.home / "cache"))


def private_folder(path: Path) -> Path:
    """`path`, made if need be, 0700; raises `FlowError` when it can't be made or written to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FlowError(f"The folder {path} can't be made: {error.strerror}. Choose another with --home.") from error
    return path


def parse_viewport(value: Any, source: str = "viewport") -> tuple[int, int]:
    """`(width, height)` from `"1366x768"` or a pair; raises `InvalidInput`."""
    parts = value.lower().split("x") if isinstance(value, str) else list(value)
    try:
        width, height = (int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{source}: {value!r} is no viewport; write it like 1366x768.") from error
    if not (100 <= width <= 8192 and 100 <= height <= 8192):
        raise InvalidInput(f"{source}: a viewport's sides lie between 100 and 8192, not {width}x{height}.")
    return width, height


def _parse(name: str, value: Any, source: str) -> Any:
    choices = {
        "env": ("development", "production"),
        "log": ("debug", "info", "warning"),
        "exec_js": ("write", "read", "off"),
    }
    match name:
        case "home" | "workflows":
            return Path(value)
        case "files":
            return Path(value).expanduser().resolve()
        case "allow_origins" | "block_origins":
            return rails.checked(re.split(r"[\s,;]+", value.strip()) if isinstance(value, str) else value, source)
        case "viewport":
            return parse_viewport(value, source)
        case "env" | "log" | "exec_js":
            if value not in choices[name]:
                raise InvalidInput(f"{source}: {value!r} is none of {', '.join(choices[name])}.")
            return value
        case "browser":
            return str(value)
        case "take_up" | "save_workflows":
            return _as_bool(value, source)
        case _:
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise InvalidInput(f"{source}: {value!r} is no number of seconds.") from error
            if not 0 < number < 1e9:
                raise InvalidInput(f"{source}: {value!r} is no usable number of seconds.")
            return number


def _as_bool(value: Any, source: str) -> bool:
    words = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise InvalidInput(f"{source}: {value!r} is neither on nor off.")
    return words[str(value).lower()]


def _as_text(value: Any) -> str:
    match value:
        case (int(width), int(height)):
            return f"{width}x{height}"
        case tuple():
            return " ".join(value)
        case _:
            return str(value)
