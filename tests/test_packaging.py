"""What is shipped: the wheel on its own, what it declares, and documents that keep up with the code."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from zipfile import ZipFile

import click
import pytest
from mcp import Client

import mcp_flow
from mcp_flow.cli import main
from mcp_flow.config import Settings
from mcp_flow.server import build

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """A command's output; the test fails with what it said when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, far from the repository."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    # The dependencies are lent by the environment of the tests: only mcp-flow itself comes from the wheel.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_runs_outside_the_repository(clean: Path) -> None:
    python = clean / "venv" / "bin" / "python"
    assert run(python, "-c", "import mcp_flow; print(mcp_flow.__file__)", cwd=clean).startswith(str(clean))
    for command in ([clean / "venv" / "bin" / "mcp-flow"], [python, "-m", "mcp_flow"]):
        assert PROJECT["version"] in run(*command, "--version", cwd=clean)


def test_the_wheel_serves_its_prompts(clean: Path) -> None:
    code = "from mcp_flow.server import prompts; print(*(prompt.name for prompt in prompts()))"
    names = run(clean / "venv" / "bin" / "python", "-c", code, cwd=clean).split()
    assert names == ["repair-run", "resume-run", "write-workflow"]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {"mcp_flow/py.typed", "mcp_flow/prompts/repair-run.md"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"mcp_flow", f"mcp_flow-{PROJECT['version']}.dist-info"}


def test_the_version_stands_in_every_place() -> None:
    assert mcp_flow.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_import_is_a_declared_dependency() -> None:
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    # What a dependency is made of comes with it.
    allowed = declared | {"mcp_flow", "mcp_types", "pydantic_core", "typing_extensions"} | sys.stdlib_module_names
    found = {name: file for file in (ROOT / "mcp_flow").rglob("*.py") for name in imported(file)}
    assert {name: file.name for name, file in found.items() if name not in allowed} == {}


def imported(file: Path) -> Iterator[str]:
    """The top-level names of all modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name.split(".")[0] for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    wanted = {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"] + groups["dev"]}
    assert wanted <= {line.split("==")[0] for line in pins}


def test_no_file_names_a_registry_or_a_place_on_this_machine() -> None:
    # Put together here, or this file would be the first to be found.
    hosts = [
        name.replace(" ", r"\.").replace("-", "")
        for name in ("pypi org", "python-hosted org", "npm-js org", "npm-js com", "deb-ian org")
    ]
    places = [rf"(?<![\w.~>-])/{name}/" for name in ("work", "root")]
    pattern = re.compile("|".join(hosts + places))
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    texts = {name: (ROOT / name).read_bytes().decode("utf-8", "replace") for name in names if (ROOT / name).is_file()}
    assert len(texts) > 20
    assert {name: found[0] for name, text in texts.items() if (found := pattern.search(text))} == {}


# --- documents ---


def table(heading: str) -> set[str]:
    """What the first column of the table under a heading of the README names."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


async def test_the_readme_names_every_tool(settings: Settings) -> None:
    async with Client(build(settings)) as client:
        assert table("Tools") == {tool.name for tool in (await client.list_tools()).tools}


def test_the_readme_names_every_command() -> None:
    named = {re.sub(r" [A-Z ]+$", "", row).removeprefix("mcp-flow ") for row in table("Commands")}
    assert named == set(commands(main))


def commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    """The full names of all commands that are not hidden."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield prefix + name


def test_the_readme_names_every_setting() -> None:
    assert table("Settings") == {f"MCP_FLOW_{field.name.upper()}" for field in fields(Settings)}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_make_targets_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (ROOT / link).exists(), link
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.mark.parametrize("document", ["README.md", "prompts/write-workflow.md"])
def test_the_workflows_in_documents_can_be_read(document: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for indent, block in blocks:
        source = "\n".join(line.removeprefix(indent) for line in block.splitlines())
        names: dict[str, object] = {"__name__": "documented"}
        exec(compile(source, document, "exec"), names)
        found = [value for value in names.values() if isinstance(value, mcp_flow.Workflow)]
        assert found
        assert all(workflow.input_schema["properties"] for workflow in found)
