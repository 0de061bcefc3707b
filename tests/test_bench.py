"""The benchmark runs and has its rows; what it finds is no matter of a test.

The rows that kill and wake processes take minutes and are left to `make bench` itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench" / "run.py"
NAMES = (
    *("steps", "replay", "concurrent", "answers", "timers", "pending", "initialize", "page", "commands"),
    *("looks", "evaluation", "acting"),
)
ROWS = (
    "durable step, 200 in sequence",
    "last tenth of them against the first",
    "replay of 200 finished steps",
    "database a step, checkpointed",
    "20 concurrent runs of 10 steps",
    "the same from claim to journaled end",
    "answer to the next question, 20 in a live run",
    "answer to the next step of a run that nobody has",
    "100 timers opened in 2 runs",
    "100 timers due at once, to the last run's end",
    "a look at them while none is due",
    "50 open requests listed",
    "the first 20 of them",
    "process start to initialize reply",
    "one-page run, start_run to finished",
    "command in one process, next step in another",
    "first look, 200 links, 50 inputs",
    "look after one action",
    'look, mode="interactive"',
    "recall from the outline",
    "exec_js, 200 links, 50 inputs",
    "act click to answer, 200 links, 50 inputs",
)


def test_a_quick_run_of_the_benchmark_prints_the_machine_the_pragmas_and_its_rows(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--folder", str(tmp_path), *NAMES],
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
