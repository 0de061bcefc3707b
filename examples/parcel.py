"""A run that waits for days: for an event from elsewhere, and for a time.

It gives its page up after a while (it is parked), and costs nothing then. `send_event("delivered", {"parcel": …})`,
from an agent or by `mcp-flow send`, wakes it, and the page is rebuilt: its address, and the `restore` steps.
"""

from datetime import timedelta
from urllib.parse import quote

from playwright.async_api import Page
from pydantic import BaseModel

from mcp_flow import Flow, workflow

PAGE = "data:text/html," + quote(
    """<title>Parcels</title><h1>Parcels</h1><form onsubmit="event.preventDefault();
done.value = `Thank you, ${who.value} has it`">
<label>Received by <input id=who></label> <button>Confirm</button></form><p><output id=done></output>"""
)


class Delivery(BaseModel):
    """What the carrier tells."""

    parcel: str
    received_by: str


@workflow
async def parcel(flow: Flow, parcel: str) -> str:
    """Wait until a parcel is delivered, for two weeks at most, and confirm it a minute later."""
    page = await flow.page()
    await flow.step("open page", page.goto, PAGE, restore=True)
    delivery = await flow.wait_for("delivered", Delivery, match={"parcel": parcel}, timeout=timedelta(weeks=2))
    await flow.sleep(60)
    return await flow.step("confirm", confirm, page, delivery.received_by)


async def confirm(page: Page, received_by: str) -> str:
    """Say who has it, and return the page's answer."""
    await page.get_by_label("Received by").fill(received_by)
    await page.get_by_role("button", name="Confirm").click()
    return await page.get_by_role("status").inner_text()
