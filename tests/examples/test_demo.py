"""The demo, run as its reader runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from clients import processes, until

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


async def test_the_demo_shows_the_way_to_a_receipt_and_leaves_no_process() -> None:
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=120)  # noqa: ASYNC221
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    for part in ("list_workflows(", "waiting-approval", "untrusted", "approve(", "Receipt A-1001: Teapot, $49.80"):
        assert part in shown, part
    journal = re.search(r"^journal +(\S+flow\.db)$", shown, re.MULTILINE)
    picture = re.search(r"^\S+ +(\S+\.png)$", shown, re.MULTILINE)
    assert journal
    assert picture
    home = Path(journal[1]).parent
    try:
        assert Path(picture[1]).read_bytes().startswith(b"\x89PNG")  # noqa: ASYNC240
        await until(lambda: not processes(home), 5)
        assert "Traceback" not in done.stderr
    finally:
        shutil.rmtree(home)
