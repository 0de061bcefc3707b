"""The repair story, run as its reader runs it: a page changes, a run fails, and eight calls later it has ended well."""

import os
import re
import subprocess
import sys
from pathlib import Path

from clients import processes, until

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_a_run_whose_page_changed_is_repaired_in_eight_calls_and_does_nothing_twice() -> None:
    before = (EXAMPLES / "shop" / "buy.py").read_bytes()
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, str(EXAMPLES / "demo_repair.py")],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "COLUMNS": "240"},
    )
    shown = done.stdout
    assert done.returncode == 0, shown + done.stderr
    assert "Traceback" not in done.stderr

    failed, _, mended = shown.partition("Where and why?")
    assert re.search(r"status +failed", failed)
    calls = re.findall(r"^   (\w+)\(", mended, re.MULTILINE)
    assert calls == ["get_run", "snapshot", "exec_js", "act", "resume", "approve", "get_run"]
    assert f"{len(calls)} calls from the failure to the end" in shown
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", shown, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))

    resumed = mended.partition("\n   resume(")[2].partition("\n   approve(")[0]
    assert re.search(r"patch .*add to cart", resumed)
    assert r"await page.get_by_role(\"button\", name=\"Put in basket: Teapot\")" in resumed
    assert "changed_steps" not in resumed
    for part in ("forms: /sign-in 1, /cart 1, /pay 1\n", "Receipt A-1001: Teapot, $49.80"):
        assert part in shown, part

    scratch = re.search(r"/\S*?/mcp-flow-repair-\w+", shown)
    assert scratch
    assert not Path(scratch[0]).exists()  # noqa: ASYNC240
    await until(lambda: not processes(scratch[0]), 5)
    assert (EXAMPLES / "shop" / "buy.py").read_bytes() == before
