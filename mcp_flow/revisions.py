"""Find, capture and compile workflow sources.

A revision is a workflow file with its project-local imports at one content hash. Its modules are made from the
kept bytes under names of their own, so that two revisions run side by side and what is imported late, from inside
a function, still belongs to the revision that imports it.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import importlib
import linecache
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

from mcp_flow.errors import BrokenWorkflow, InvalidInput
from mcp_flow.scan import imports

_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "env"}
_PREFIX = "mcp_flow_revision_"
_FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]*/){0,8}[A-Za-z0-9_][A-Za-z0-9_-]*\.py")


@dataclass(frozen=True, slots=True)
class Revision:
    """The files of a workflow by their names under `root`; the hash covers contents and names, never `root`."""

    root: str
    entry: str
    files: Mapping[str, bytes]
    hash: str

    @property
    def path(self) -> str:
        """The absolute path of the workflow's own file."""
        return os.path.join(self.root, self.entry)


def find_files(root: Path) -> list[Path]:
    """Every workflow file under a folder, sorted; nothing hidden, installed, or linked from outside."""
    found = []
    home = root.resolve()
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in _SKIPPED
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        ]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and name.endswith(".py") and _lies_in(path, home):
                found.append(path)
    return sorted(found)


def capture(root: Path, entry: str, source: bytes | None = None) -> Revision:
    """The revision that stands on disk now: `entry`, a file under `root`, and what it imports from there.

    With a `source` it is the revision that there would be if the entry held that. Raises `BrokenWorkflow` when the file
    can't be read. A file that does not parse is captured all the same.
    """
    name = PurePosixPath(entry)
    if name.is_absolute() or ".." in name.parts:
        raise BrokenWorkflow(f"{entry!r} is not the name of a file under {root}.")
    files: dict[str, bytes] = {}
    pending = [str(name)]
    while pending:
        name_now = pending.pop()
        if name_now in files:
            continue
        try:
            given = source if source is not None and name_now == str(name) else None
            files[name_now] = (root / name_now).read_bytes() if given is None else given
        except OSError as error:
            raise BrokenWorkflow(f"{root / name_now}: the file can't be read: {error.strerror}.") from error
        pending += _imported(name_now, files[name_now], lambda file: (root / file).is_file())
    return Revision(str(root), str(name), files, _hash(str(name), files))


def entry_of(root: Path, name: str) -> str:
    """The entry of the workflow file that is called `name`, like `buy` or `shop/buy`, whether it is there or not.

    Raises `InvalidInput` for a name that is none, or that leads out of the folder through a link.
    """
    entry = f"{name.removesuffix('.py')}.py"
    if len(entry) > 200 or not _FILE_NAME.fullmatch(entry) or _SKIPPED & set(PurePosixPath(entry).parts):
        raise InvalidInput(
            f"{name!r:.200} is no name of a workflow file: letters, digits, dashes and underscores, with slashes "
            "between folders, such as buy or shop/buy."
        )
    path = root / entry
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if path.is_symlink() or not existing.resolve().is_relative_to(root.resolve()):
        raise InvalidInput(f"{name!r} leads out of the workflows folder {root} through a link.")
    return entry


def write(root: Path, entry: str, source: bytes) -> None:
    """Put `source` into the file as a whole, so that nobody reads half of it; raises `BrokenWorkflow`."""
    path = root / entry
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".draft", delete=False) as draft:
            draft.write(source)
        os.chmod(draft.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(draft.name, path)
    except OSError as error:
        raise BrokenWorkflow(f"{path} can't be written: {error.strerror}.") from error


def load(revision: Revision) -> ModuleType:
    """The module of the revision's entry, made once from the kept bytes.

    Raises `BrokenWorkflow` with file and line when one of its files does not compile or raises at import.
    """
    home = _Home.of(revision)
    try:
        return importlib.import_module(home.names[revision.entry])
    except (Exception, SystemExit) as error:  # boundary: the author's code
        text = _describe(error, revision).replace(f"{home.prefix}.", "").replace(home.prefix, revision.root)
        raise BrokenWorkflow(text) from error


def source_line(revision: Revision, file: str, line: int) -> str | None:
    """One line of a revision's file, named absolutely or under its root, as it was when it was captured."""
    name = os.path.relpath(file, revision.root) if os.path.isabs(file) else file
    source = revision.files.get(PurePosixPath(name).as_posix())
    lines = [] if source is None else _decode(source).splitlines()
    # A frame that is about to be entered or left may have no line.
    return lines[line - 1] if line and 0 < line <= len(lines) else None


def diff(before: Mapping[str, bytes], after: Mapping[str, bytes], limit: int) -> str:
    """What changed between two revisions' files, as a unified diff of at most `limit` characters."""
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = (_decode(files[name]).splitlines() if name in files else [] for files in (before, after))
        lines += difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=1, lineterm="")
    text = "\n".join(lines)
    if len(text) <= limit:
        return text
    kept = text[:limit].rpartition("\n")[0] or text[:limit]
    return f"{kept}\n… (cut: {len(lines)} lines in all)"


# --- finding ---


def _lies_in(path: Path, home: Path) -> bool:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return real.is_file() and real.is_relative_to(home)


def _hash(entry: str, files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(entry.encode("utf-8", "surrogateescape"))
    for name, content in sorted(files.items()):
        digest.update(b"\0" + name.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _imported(file: str, source: bytes, exists: Callable[[str], bool]) -> list[str]:
    """The files that importing `file` needs: those its imports name, and the packages that all of them lie in."""
    found: list[str] = []
    for statement in imports(source):
        names = [statement.module, *(f"{statement.module}.{name}".lstrip(".") for name in statement.names)]
        for name in names:
            if statement.level:
                folder = _above(_folder(file), statement.level - 1)
                located = None if folder is None else _module_file(folder, name, exists)
            else:
                located = _locate(name, file, exists)
            if located is not None:
                found.append(located)
    for located in (file, *found):
        folders = [folder for folder in _folders(located) if folder]
        found += [init for folder in folders if exists(init := f"{folder}/__init__.py")]
    return found


def _locate(name: str, importer: str, exists: Callable[[str], bool]) -> str | None:
    """The file of an absolute import: beside the importing file, or in a folder above it, up to the root.

    The standard library and this package can't be shadowed: nobody means to by calling a workflow `calendar.py`.
    """
    if name.partition(".")[0] in sys.stdlib_module_names | {"mcp_flow"}:
        return None
    located = (_module_file(folder, name, exists) for folder in _folders(importer))
    return next((file for file in located if file is not None), None)


def _module_file(folder: str, name: str, exists: Callable[[str], bool]) -> str | None:
    base = "/".join(part for part in (folder, *name.split(".")) if part)
    candidates = [f"{base}/__init__.py".lstrip("/")] + ([f"{base}.py"] if name else [])
    return next((file for file in candidates if exists(file)), None)


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _folders(file: str) -> list[str]:
    """The folder of a file and those above it, nearest first; the root is the empty name."""
    parts = _folder(file).split("/") if "/" in file else []
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _above(folder: str, levels: int) -> str | None:
    parts = folder.split("/") if folder else []
    return "/".join(parts[: len(parts) - levels]) if levels <= len(parts) else None


# --- importing ---


class _Home(MetaPathFinder, InspectLoader):
    """Finds and loads one revision's modules, with CPython's own machinery for cycles, locks and packages.

    All of them lie in a package that stands for the root, under a name that no other revision has.
    """

    def __init__(self, revision: Revision, prefix: str) -> None:
        self.revision = revision
        self.prefix = prefix
        self.names = {file: self._module_name(file) for file in revision.files}
        # Sorted so that a package wins over a module of its name, as everywhere.
        self.files = {name: file for file, name in sorted(self.names.items(), key=_is_package)}
        self.folders = {self._dotted(folder) for file in revision.files for folder in _folders(file)}

    @classmethod
    def of(cls, revision: Revision) -> _Home:
        """The one home of a revision in this process, on the import path."""
        key = hashlib.sha256(f"{revision.root}\0{revision.hash}".encode("utf-8", "surrogateescape")).hexdigest()
        prefix = _PREFIX + key[:20]
        for finder in sys.meta_path:
            if isinstance(finder, cls) and finder.prefix == prefix:
                return finder
        home = cls(revision, prefix)
        sys.meta_path.insert(0, home)
        return home

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.prefix):
            return None
        file = self.files.get(fullname)
        if file is None:
            return ModuleSpec(fullname, None, is_package=True) if fullname in self.folders else None
        origin = os.path.join(self.revision.root, file)
        spec = ModuleSpec(fullname, self, origin=origin, is_package=_is_package((file, "")))
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        return _decode(self.revision.files[self.files[fullname]])

    def get_code(self, fullname: str) -> CodeType:
        file = self.files[fullname]
        return compile(self.revision.files[file], os.path.join(self.revision.root, file), "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        file = self.files[module.__name__]
        path = os.path.join(self.revision.root, file)
        code = self.get_code(module.__name__)
        lines = self.get_source(module.__name__).splitlines(keepends=True)
        # Without a time of change, linecache never replaces these lines by those on disk.
        linecache.cache[path] = (sum(map(len, lines)), None, lines, path)
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": self._importer(file)}
        exec(code, vars(module))

    def _importer(self, importer: str) -> Callable[..., ModuleType]:
        """The `__import__` of one file: what the revision holds, then what everybody else would get."""

        def import_(
            name: str,
            globals: Mapping[str, Any] | None = None,
            locals: Mapping[str, Any] | None = None,
            fromlist: Iterable[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            names = tuple(fromlist or ())
            found = None if level else self._find(name, names, importer)
            if found is None:
                return builtins.__import__(name, globals, locals, names, level)
            if names:
                return builtins.__import__(found, globals, locals, names, 0)
            importlib.import_module(found)
            # `import a.b` binds a.
            return sys.modules[found.rsplit(".", name.count("."))[0]]

        return import_

    def _find(self, name: str, names: tuple[str, ...], importer: str) -> str | None:
        exists = self.revision.files.__contains__
        if file := _locate(name, importer, exists):
            return self.names[file]
        for submodule in names:
            # A folder without __init__.py is known by what is in it.
            if file := _locate(f"{name}.{submodule}", importer, exists):
                return self.names[file].rpartition(".")[0]
        return None

    def _module_name(self, file: str) -> str:
        stem = (
            file.removesuffix(".py").removesuffix("__init__") if _is_package((file, "")) else file.removesuffix(".py")
        )
        return self._dotted(stem.rstrip("/"))

    def _dotted(self, name: str) -> str:
        # A dot in a file's name would read as a package.
        return ".".join([self.prefix, *(part.replace(".", "·") for part in name.split("/") if part)])


def _is_package(item: tuple[str, str]) -> bool:
    return item[0].rpartition("/")[2] == "__init__.py"


def _decode(source: bytes) -> str:
    try:
        return decode_source(source)
    except (SyntaxError, UnicodeDecodeError):
        return source.decode("utf-8", "replace")


def _describe(error: BaseException, revision: Revision) -> str:
    """File, line and what happened there, in one line."""
    inside = {os.path.join(revision.root, file) for file in revision.files}
    if isinstance(error, SyntaxError) and error.filename in inside:
        return f"{error.filename}:{error.lineno or 1}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in inside]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else f"{revision.path}:1"
    if isinstance(error, SystemExit):
        return f"{place}: it exits at import with status {error.code if error.code is not None else 0}"
    if isinstance(error, BrokenWorkflow):
        return str(error)
    return f"{place}: {type(error).__name__}: {' '.join(str(error).split())}"
