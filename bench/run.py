"""`make bench`: what mcp-flow costs on this machine, with the machine's own floor beside it, measured in the same run.

    bench/run.py [--quick] [--profile NAME] [--folder DIR] [NAME …]

Times are medians over rounds in which measurement and floor take turns. It exits with 0 whatever it finds: a
benchmark is no test.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import journal
import pages
import processes
import survival
import waits
from journal import Row
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "steps": journal.bench_steps,
    "replay": journal.bench_replay,
    "concurrent": journal.bench_concurrent,
    "answers": waits.bench_waits,
    "timers": waits.bench_timers,
    "pending": waits.bench_pending,
    "initialize": processes.bench_initialize,
    "page": processes.bench_page,
    "death": survival.bench_death,
    "waking": survival.bench_waking,
    "waits": survival.bench_waits,
    "commands": survival.bench_commands,
    "checkpoints": survival.bench_checkpoints,
    "looks": pages.bench_looks,
    "evaluation": pages.bench_evaluation,
    "acting": pages.bench_acting,
    "calls": pages.bench_calls,
    "hijack": pages.bench_hijack,
}


def main() -> None:
    """Measure what was asked for, and print it."""
    parser = argparse.ArgumentParser(description="What mcp-flow costs on this machine, beside the machine's own floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds: figures for orientation only")
    parser.add_argument("--profile", choices=BENCHMARKS, help="print where the time of this one goes (and distort it)")
    parser.add_argument("--folder", type=Path, help="where the databases are put (default: /var/tmp)")
    given = parser.parse_args()
    if unknown := set(given.names) - BENCHMARKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    names = given.names or ([given.profile] if given.profile else list(BENCHMARKS))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    # Not the usual temporary folder: that is often memory, where a durable commit costs nothing.
    folder = given.folder or (Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="mcp-flow-bench-", dir=folder) as scratch:
        console.print(_machine(Path(scratch)), soft_wrap=True)
        rows: list[Row] = []
        pragmas: dict[str, Any] = {}
        for name in names:
            console.print(f"measuring {name} …", style="dim")
            began = time.monotonic()
            found, seen = _measure(name, Path(scratch), given.quick, given.profile == name)
            console.print(f"  {time.monotonic() - began:.1f} s", style="dim")
            rows += found
            pragmas |= seen
    if pragmas:
        console.print("pragmas: " + ", ".join(f"{name}={value}" for name, value in pragmas.items()), soft_wrap=True)
    console.print(_table(rows, given.quick))


def _measure(name: str, folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    try:
        return asyncio.run(BENCHMARKS[name](folder, quick, profile))
    except Exception as error:  # the other rows are still worth having
        return [Row(name, f"not measured: {type(error).__name__}: {error}", met=False)], {}


def _machine(folder: Path) -> str:
    known = Path("/proc/mounts")
    mounts = [line.split()[:3] for line in known.read_text().splitlines()] if known.exists() else []
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    system = max(inside, key=lambda mount: len(mount[1]), default=["?", "?", "?"])[2]
    return (
        f"machine: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {system} under {folder.parent}"
    )


def _table(rows: list[Row], quick: bool) -> Table:
    table = Table(title="quick: too short for a judgement" if quick else None, title_justify="left")
    for column in ("what", "measured", "floor or peer", "ratio", "aim", "met?"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = {True: "[green]met[/]", False: "[bold red]missed[/]", None: ""}[row.met]
        table.add_row(row.what, row.measured, row.floor, row.ratio, row.aim, verdict)
    return table


if __name__ == "__main__":
    main()
