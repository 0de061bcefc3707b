"""The soak in its short form: `make soak` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).with_name("soak.py")


def test_runs_whose_servers_and_workers_are_killed_at_random_finish_and_leave_nothing_behind() -> None:
    ran = subprocess.run(
        [sys.executable, str(SOAK), "--runs=12", "--workers=3", "--seconds=7", "--limit=60", "--pages=6"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    # A soak that struck at nothing has shown nothing.
    assert "workers killed" in ran.stdout, ran.stdout
    assert "all is well" in ran.stdout
