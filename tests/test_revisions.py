from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import anyio
import pytest

from mcp_flow import config
from mcp_flow.catalog import Catalog, Reader
from mcp_flow.config import Settings
from mcp_flow.definition import workflows_in
from mcp_flow.errors import BrokenWorkflow, InvalidInput, UnknownWorkflow
from mcp_flow.revisions import capture, diff, find_files, load, source_line
from mcp_flow.scan import notes

Write = Callable[..., Path]

OWN_READER = True
"""These tests are about the child."""

HELLO = """
    from mcp_flow import workflow

    @workflow
    async def hello(flow, name: str = "you") -> str:
        '''Greets.'''
        return name
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One folder of workflows for all tests, because a reader reads but one."""
    folder = tmp_path_factory.mktemp("revisions")
    return config.load(home=folder / "home", workflows=folder / "workflows")


@pytest.fixture
def root(settings: Settings) -> Iterator[Path]:
    """The folder of workflows, empty."""
    settings.workflows.mkdir()
    yield settings.workflows
    shutil.rmtree(settings.workflows, ignore_errors=True)


@pytest.fixture
def write(root: Path) -> Write:
    def write(name: str, source: str = "") -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source).lstrip("\n"))
        return path

    return write


@pytest.fixture(scope="module")
async def reader(settings: Settings) -> AsyncIterator[Reader]:
    """A reader that tests share, since its child takes longer to start than to read."""
    async with Reader(settings) as opened:
        yield opened


def imported(root: Path, entry: str) -> ModuleType:
    return load(capture(root, entry))


# --- finding and capturing ---


def test_hidden_installed_and_foreign_files_are_not_workflow_files(root: Path, write: Write, tmp_path: Path) -> None:
    kept = [write("a.py"), write("shop/b.py")]
    for name in (".hidden.py", ".git/c.py", "shop/__pycache__/d.py", "tools/pyvenv.cfg", "tools/lib/e.py", "f.txt"):
        write(name)
    outside = tmp_path / "outside.py"
    outside.touch()
    (root / "link.py").symlink_to(outside)
    (root / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    assert find_files(root) == kept
    assert find_files(root / "missing") == []


def test_a_revision_holds_what_its_entry_imports_from_the_project(root: Path, write: Write) -> None:
    write(
        "shop/buy.py",
        """
        import os, calendar
        import prices.tax as tax
        from . import money
        from beside import x
        def late():
            from above import y
            from prices import rates
        """,
    )
    for name in ("shop/__init__.py", "shop/money.py", "shop/beside.py", "above.py", "calendar.py", "unused.py"):
        write(name, "x = y = 1")
    for name in ("prices/__init__.py", "prices/tax.py", "prices/rates.py", "prices/other.py"):
        write(name)
    assert sorted(capture(root, "shop/buy.py").files) == [
        *("above.py", "prices/__init__.py", "prices/rates.py", "prices/tax.py"),
        *("shop/__init__.py", "shop/beside.py", "shop/buy.py", "shop/money.py"),
    ]


def test_a_hash_covers_content_and_names_but_not_the_place(root: Path, write: Write, tmp_path: Path) -> None:
    write("a.py", "import b")
    write("b.py", "x = 1")
    first = capture(root, "a.py").hash
    root.rename(tmp_path / "moved")
    assert capture(tmp_path / "moved", "a.py").hash == first
    (tmp_path / "moved" / "b.py").write_text("x = 2")
    assert capture(tmp_path / "moved", "a.py").hash != first


def test_a_file_that_does_not_parse_is_captured_and_one_that_is_gone_is_not(root: Path, write: Write) -> None:
    write("bad.py", "def (:")
    assert capture(root, "bad.py").files == {"bad.py": b"def (:"}
    for name in ("gone.py", "../bad.py", "/bad.py"):
        with pytest.raises(BrokenWorkflow):
            capture(root, name)


# --- importing ---


def test_two_revisions_with_helpers_of_one_name_run_side_by_side(root: Path, write: Write) -> None:
    write("buy.py", "import helper\ndef price(): return helper.price()\ndef late():\n  import helper as h\n  return h")
    write("helper.py", "def price(): return 1")
    old = imported(root, "buy.py")
    write("helper.py", "def price(): return 2")
    new = imported(root, "buy.py")
    assert (old.price(), new.price(), old.price()) == (1, 2, 1)
    assert (old.late().price(), new.late().price()) == (1, 2)
    assert old.late() is old.helper
    assert "helper" not in sys.modules


def test_an_edit_of_the_same_size_in_the_same_second_is_seen(root: Path, write: Write) -> None:
    times = (1_900_000_000, 1_900_000_000)
    os.utime(write("a.py", "x = 1"), times)
    first = imported(root, "a.py")
    os.utime(write("a.py", "x = 2"), times)
    assert (first.x, imported(root, "a.py").x) == (1, 2)
    assert list(root.rglob("*.pyc")) == []


def test_a_late_import_gives_the_revisions_own_module_after_an_edit(root: Path, write: Write) -> None:
    write("a.py", "def late():\n  from lib.deep import x\n  return x")
    write("lib/deep.py", "x = 1")
    module = imported(root, "a.py")
    write("lib/deep.py", "x = 2")
    assert module.late() == 1


def test_imports_bind_what_python_binds(root: Path, write: Write) -> None:
    write("pkg/__init__.py", "from .one import x\nfrom . import two")
    write("pkg/one.py", "x = 1")
    write("pkg/two.py", "from ..top import y\nfrom .one import *\n__all__ = ['x', 'y']")
    write("pkg/inner/three.py", "from ... import top\nfrom .. import one")
    write("top.py", "y = 2")
    write(
        "a.py",
        """
        import os.path
        import pkg.inner.three
        import pkg.two as two
        from pkg.inner import three
        from pkg.two import *
        import json as calendar
        """,
    )
    module = imported(root, "a.py")
    assert module.os is os
    assert module.pkg.inner.three is module.three
    assert module.two is module.pkg.two
    assert (module.x, module.y, module.three.top.y, module.three.one.x) == (1, 2, 2, 1)


def test_modules_may_import_each_other(root: Path, write: Write) -> None:
    write("a.py", "import b\nx = 1\ndef get(): return b.y")
    write("b.py", "import a\ny = 2\ndef get(): return a.x")
    module = imported(root, "a.py")
    assert (module.get(), module.b.get()) == (2, 1)
    assert module.b.a is module


def test_a_workflow_file_shadows_neither_the_library_nor_a_package_that_is_none(root: Path, write: Write) -> None:
    write("calendar.py", "import calendar\nfound = calendar.month_name")
    write("anyio.py", "from anyio.abc import TaskGroup")
    assert imported(root, "calendar.py").found is not None
    assert imported(root, "anyio.py").TaskGroup is anyio.abc.TaskGroup


def test_models_dataclasses_and_pickles_find_their_module(root: Path, write: Write) -> None:
    write(
        "a.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass
        from pydantic import BaseModel
        from mcp_flow import workflow

        @workflow
        async def buy(flow, order: Order) -> list[Order]: return [order]

        class Order(BaseModel):
            items: list[Item]

        class Item(BaseModel):
            name: str

        @dataclass
        class Point:
            x: int
        """,
    )
    module = imported(root, "a.py")
    buy = workflows_in(module)["buy"]
    order = module.Order(items=[module.Item(name="tea")])
    assert buy.arguments({"items": [{"name": "tea"}]}) == {"order": order}
    assert pickle.loads(pickle.dumps(module.Point(1))) == module.Point(1)


def test_a_module_belongs_to_its_file_whatever_its_name(root: Path, write: Write) -> None:
    write("v1.2/my-flow.py", HELLO + "    print(__name__)")
    workflow = workflows_in(imported(root, "v1.2/my-flow.py"))["hello"]
    assert workflow.file == str(root / "v1.2" / "my-flow.py")
    assert workflow.line == 3


def test_an_imported_workflow_belongs_to_the_file_that_defines_it(root: Path, write: Write) -> None:
    write("hello.py", HELLO)
    write("other.py", "from hello import hello\nfrom mcp_flow import workflow\n@workflow\nasync def mine(flow): ...")
    assert list(workflows_in(imported(root, "other.py"))) == ["mine"]


def test_a_line_is_the_one_that_was_captured(root: Path, write: Write) -> None:
    path = write("a.py", "x = 1\ny = 'é'\n")
    revision = capture(root, "a.py")
    write("a.py", "changed")
    assert source_line(revision, str(path), 2) == source_line(revision, "a.py", 2) == "y = 'é'"
    assert source_line(revision, "a.py", 3) is source_line(revision, os.__file__, 1) is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\ndef (:", "a.py:2: SyntaxError: "),
        ("x = 1\n\x00", "a.py"),
        ("x = 0\n1 / 0", "a.py:2: ZeroDivisionError: division by zero"),
        ("import bad", "bad.py:2: ValueError: from here"),
        ("import sys\nsys.exit(3)", "a.py:2: it exits at import with status 3"),
        ("from . import nowhere", "cannot import name 'nowhere'"),
        ("def f():\n  raise KeyError('k')\nf()", "a.py:2: KeyError: 'k'"),
    ],
)
def test_what_stops_an_import_is_told_with_file_and_line(root: Path, write: Write, source: str, said: str) -> None:
    write("a.py", source)
    write("bad.py", "x = 0\nraise ValueError('from\\nhere')")
    revision = capture(root, "a.py")
    for _ in range(2):
        with pytest.raises(BrokenWorkflow) as caught:
            load(revision)
        assert said in str(caught.value)
        assert "mcp_flow_revision_" not in str(caught.value)


# --- scanning ---


def test_steps_are_listed_in_order_and_actions_outside_steps_are_warned_of() -> None:
    source = dedent(
        """
        @workflow
        async def buy(flow, order):
            page = await flow.page()
            await flow.step("open", page.goto, "/")
            await page.goto("/")
            button = page.get_by_role("button").first
            await button.click()
            await flow.step("press", lambda: page.keyboard.press("Enter"))
            async def fill():
                await page.fill("#a", "b")
            await flow.step("fill", fill)
            await page.keyboard.press("Enter")
            if await page.title():
                await flow.step(f"not literal {order}", fill)
            order.clear()
        """
    ).encode()
    noted = notes(source, 2)
    assert noted.steps == ("open", "press", "fill")
    assert [warning.partition(" outside")[0] for warning in noted.warnings] == [
        "line 6: page.goto",
        "line 8: button.click",
        "line 13: page.keyboard.press",
    ]
    assert 'await flow.step("…", page.goto, …)' in noted.warnings[0]


# --- reading in a child ---


async def test_files_that_break_in_every_way_leave_the_others_listed(settings: Settings, write: Write) -> None:
    write("hello.py", HELLO)
    write("noisy.py", "print('noise')\nimport os\nos.write(1, b'noise')" + dedent(HELLO.replace("hello", "noisy")))
    uses = "from mcp_flow import workflow\n"
    broken = {
        "hang.py": (
            "import time\nwhile True: time.sleep(9)",
            "hang.py:3: it did not import within 1 s; it stands at",
        ),
        "exit.py": ("import os\nos._exit(1)", "exit.py:3: it ended its process at import with status 1"),
        "silent.py": ("import os\nos._exit(0)", "silent.py:3: it ended its process at import with status 0"),
        "leave.py": ("raise SystemExit('bye')", "leave.py:2: it exits at import with status bye"),
        "crash.py": ("import os\nos.abort()", "crash.py:3: it crashed at import with SIGABRT"),
        "parse.py": ("def (:", "parse.py:2: SyntaxError"),
        "fail.py": ("1 / 0", "fail.py:2: ZeroDivisionError"),
        "sync.py": ("@workflow\ndef plain(flow): ...", "async def plain(flow, …)"),
        "twice.py": ("a, b = [workflow(name='x')(f) for f in [F, F]]", "twice.py:2: NameError"),
    }
    for name, (source, _) in broken.items():
        write(name, uses + source)
    async with Reader(settings, limit=1.0) as reader:
        catalog = await reader.catalog()
    assert list(catalog.workflows) == ["hello", "noisy"]
    assert {Path(found.file).name for found in catalog.broken} == broken.keys()
    for found in catalog.broken:
        assert broken[Path(found.file).name][1] in found.error
        assert found.error.startswith(found.file)


async def test_a_description_says_all_that_an_agent_needs(reader: Reader, write: Write) -> None:
    path = write("shop/hello.py", HELLO)
    modules = set(sys.modules)
    described, revision = await reader.describe("hello")
    assert (described.name, described.function, described.description) == ("hello", "hello", "Greets.")
    assert (described.file, described.line) == (str(path), 3)
    assert described.input_schema["properties"] == {"name": {"default": "you", "type": "string"}}
    assert described.output_schema == {"type": "string"}
    assert (revision.entry, revision.files) == ("shop/hello.py", {"shop/hello.py": path.read_bytes()})
    assert set(sys.modules) == modules


async def test_a_file_is_read_as_it_is_now(reader: Reader, write: Write) -> None:
    write("hello.py", HELLO)
    _, first = await reader.describe("hello")
    write("hello.py", HELLO.replace("Greets", "Waves!"))
    described, second = await reader.describe("hello")
    assert described.description == "Waves!."
    assert first.hash != second.hash


async def test_names_that_files_share_are_told_apart_by_file(reader: Reader, write: Write) -> None:
    for name in ("a.py", "shop/b.py"):
        write(name, HELLO)
    assert list((await reader.catalog()).workflows) == ["a:hello", "shop/b:hello"]
    with pytest.raises(UnknownWorkflow, match="say which: a:hello, shop/b:hello"):
        await reader.describe("hello")
    for name in ("shop/b:hello", "shop/b.py:hello"):
        described, revision = await reader.describe(name)
        assert (described.name, revision.entry) == ("shop/b:hello", "shop/b.py")


async def test_an_unknown_name_gets_the_names_there_are(reader: Reader, write: Write) -> None:
    with pytest.raises(UnknownWorkflow, match="No file under"):
        await reader.describe("hello")
    write("hello.py", HELLO)
    write("broken.py", "from mcp_flow import workflow\n1 / 0")
    with pytest.raises(UnknownWorkflow) as caught:
        await reader.describe("helo")
    assert "Did you mean hello? Known: hello." in str(caught.value)
    assert "broken.py:2: ZeroDivisionError" in str(caught.value)
    for name in ("", ":", "nowhere:hello", "../hello:hello", "\ud800"):
        with pytest.raises(UnknownWorkflow):
            await reader.describe(name)


async def test_a_workflow_in_a_broken_file_is_told_with_the_error(reader: Reader, write: Write) -> None:
    write("hello.py", HELLO + "    1 / 0")
    for name in ("hello", "hello:hello"):
        with pytest.raises(BrokenWorkflow, match=r"hello.py:7: ZeroDivisionError"):
            await reader.describe(name)


async def test_a_broken_file_that_nobody_asks_for_does_not_hold_up_the_others(settings: Settings, write: Write) -> None:
    write("hello.py", HELLO)
    write("hang.py", "from mcp_flow import workflow\nwhile True: pass")
    async with Reader(settings, limit=600) as reader:
        with anyio.fail_after(60):
            described, revision = await reader.describe("hello")
            assert await reader.validate(revision, described.function, {}) == {"name": "you"}


async def test_input_is_validated_by_the_revision_it_is_for(reader: Reader, write: Write) -> None:
    write("hello.py", HELLO)
    _, old = await reader.describe("hello")
    write("hello.py", HELLO.replace('name: str = "you"', "name: int"))
    _, new = await reader.describe("hello")
    assert await reader.validate(old, "hello", {"name": "x"}) == {"name": "x"}
    with pytest.raises(InvalidInput) as caught:
        await reader.validate(new, "hello", {"name": "x", "more": 1})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["name", "more"]
    assert str(caught.value).count("valid integer") == 1
    with pytest.raises(BrokenWorkflow, match="no workflow 'gone'"):
        await reader.validate(new, "gone", {})
    with pytest.raises(InvalidInput, match="not JSON"):
        await reader.validate(new, "hello", {"name": object()})


async def test_a_failure_is_read_again_and_a_success_is_kept(reader: Reader, write: Write, tmp_path: Path) -> None:
    needed = tmp_path / "needed"
    write("hello.py", f"open({str(needed)!r})\n" + dedent(HELLO))
    assert len((await reader.catalog()).broken) == 1
    needed.touch()
    assert list((await reader.catalog()).workflows) == ["hello"]
    needed.unlink()
    assert list((await reader.catalog()).workflows) == ["hello"]


async def test_what_a_file_starts_at_import_ends_with_its_reading(reader: Reader, write: Write, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    start = f"""
        import os, subprocess, threading, time
        process = subprocess.Popen(["sleep", "600"])
        threading.Thread(target=time.sleep, args=(600,)).start()
        if (forked := os.fork()) == 0:
            time.sleep(600)
        open({str(pids)!r}, "w").write(f"{{process.pid}} {{forked}}")
    """
    write("hello.py", dedent(start) + dedent(HELLO))
    assert list((await reader.catalog()).workflows) == ["hello"]
    with anyio.fail_after(10):
        for pid in pids.read_text().split():
            while _runs(int(pid)):
                await anyio.lowlevel.checkpoint()


async def test_a_lost_child_is_replaced_even_under_several_requests(reader: Reader, write: Write) -> None:
    for number in range(6):
        write(f"w{number}.py", HELLO.replace("hello", f"hello{number}"))
    await reader.warm()
    assert reader._child is not None
    lost = reader._child.process
    lost.kill()
    lost.wait()
    assert len((await reader.catalog()).workflows) == 6
    assert reader._child is not None
    assert reader._child.process.pid != lost.pid


async def test_several_requests_at_once_get_their_own_answers(reader: Reader, write: Write) -> None:
    write("hello.py", HELLO)
    _, revision = await reader.describe("hello")
    answers: dict[int, object] = {}

    async def ask(number: int) -> None:
        answers[number] = await reader.validate(revision, "hello", {"name": "x" * 100_000 + str(number)})

    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(ask, number)
    assert answers == {number: {"name": "x" * 100_000 + str(number)} for number in range(12)}


async def test_a_cancelled_request_leaves_the_reader_usable(settings: Settings, write: Write) -> None:
    write("hang.py", "from mcp_flow import workflow\nwhile True: pass")
    async with Reader(settings, limit=0.5) as reader:
        await reader.warm()
        with anyio.move_on_after(0.1) as scope:
            await reader.catalog()
        assert scope.cancelled_caught
        catalog = await reader.catalog()
        assert len(catalog.broken) == 1


async def test_closing_ends_the_child(settings: Settings, write: Write) -> None:
    write("hello.py", HELLO)
    async with Reader(settings) as reader:
        await reader.warm()
        assert reader._child is not None
        process = reader._child.process
    assert process.returncode == 0


async def test_a_missing_folder_is_an_empty_catalog(settings: Settings) -> None:
    nowhere = replace(settings, workflows=settings.workflows / "nowhere")
    async with Reader(nowhere) as reader:
        assert await reader.catalog() == Catalog({}, [])


def _runs(pid: int) -> bool:
    """Whether a process still runs; one that nobody has reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_difference_names_files_that_changed_came_and_went_and_nothing_else() -> None:
    before = {"flow.py": b"a = 1\nb = 2\n", "lib/same.py": b"x\n", "lib/old.py": b"gone\n"}
    after = {"flow.py": b"a = 1\nb = 3\n", "lib/same.py": b"x\n", "lib/new.py": "\u00fc\n".encode()}
    text = diff(before, after, 4000)
    assert "--- a/flow.py\n+++ b/flow.py\n" in text
    assert "-b = 2\n+b = 3" in text
    assert "-gone" in text
    assert "+\u00fc" in text
    assert "same" not in text
    assert diff(before, before, 4000) == ""


def test_a_long_difference_is_cut_at_a_line_and_says_how_long_it_is() -> None:
    text = diff({}, {"flow.py": b"".join(b"line = %d\n" % n for n in range(500))}, 100)
    assert len(text) < 150
    *lines, last = text.splitlines()
    assert lines[-1].startswith("+line = ")
    assert last == "\u2026 (cut: 503 lines in all)"
