"""A workflow that fails, and how it is repaired.

The last step clicks a button that the page does not have, so the run fails and its page stays open. From there:

1. `snapshot` shows what the page does have: a button "Send".
2. Either set BUTTON below to "Send" and save the file, or rename the page's button with
   `exec_js(run_id, code="document.querySelector('#send').textContent = 'Submit'", mode="write")`.
3. `resume` goes on from the failed step, on the same page. The visitor was counted once and is not counted again:
   the page still says 1.
"""

from urllib.parse import quote

from playwright.async_api import Page
from pydantic import BaseModel

from mcp_flow import Flow, workflow

BUTTON = "Submit"
PATIENCE = 2_000  # milliseconds that a click waits for its button

PAGE = "data:text/html," + quote(
    """<title>Guest book</title><h1>Guest book</h1><p>Visitors: <output id=n>0</output>
<p><button onclick=n.value++>Count me</button> <button id=send onclick="t.innerText='Thank you'">Send</button>
<p id=t role=status>"""
)


class Visit(BaseModel):
    """Which visitor this was, and what the page answered."""

    visitor: int
    answer: str


@workflow
async def flaky(flow: Flow) -> Visit:
    """Sign a guest book; fails until its code or its page is repaired, and shows how that is done."""
    page = await flow.page()
    await flow.step("open guest book", page.goto, PAGE)
    visitor = await flow.step("count visitor", count_visitor, page)
    answer = await flow.step("send", send, page)
    return Visit(visitor=visitor, answer=answer)


async def count_visitor(page: Page) -> int:
    """Count one more visitor, and return which one it was."""
    await page.get_by_role("button", name="Count me").click()
    return int(await page.locator("#n").inner_text())


async def send(page: Page) -> str:
    """Send the entry, and return the page's answer."""
    await page.get_by_role("button", name=BUTTON).click(timeout=PATIENCE)
    return await page.locator("#t").inner_text()
