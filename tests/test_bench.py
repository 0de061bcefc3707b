"""The benchmark runs and has every row; what it finds is no matter of a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench" / "run.py"
ROWS = (
    "durable step, 200 in sequence",
    "last tenth of them against the first",
    "replay of 200 finished steps",
    "database a step, checkpointed",
    "20 concurrent runs of 10 steps",
    "the same from claim to journaled end",
    "process start to initialize reply",
    "one-page run, start_run to finished",
    "worker's death to next step, live page",
    "neither imports nor the driver's start",
    "answer to next step's end, parked run",
    "the same, run that waits with its page",
    "memory of 50 waiting runs",
    "CPU of worker and server, 50 waiting",
    "CPU of an idle server, the worker gone",
    "command in one process, next step in another",
    "a click as a step, its page kept",
    "checkpoints written",
)


def test_a_quick_run_of_the_benchmark_prints_the_machine_the_pragmas_and_every_row(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "SQLite" in ran.stdout.splitlines()[0]
    assert "journal_mode=wal, synchronous=2" in ran.stdout
    for row in ROWS:
        assert row in ran.stdout
    assert "not measured" not in ran.stdout, ran.stdout
    assert list(tmp_path.iterdir()) == []
