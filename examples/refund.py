"""A decision that only a person may take, with what it is about in front of them.

The run waits at the page it has prepared. An agent can look at it, but `approve` asks the person through the client, or
says what to type: `mcp-flow approve <request>`. What was decided, by whom and why, is in the journal.
"""

from urllib.parse import quote

from playwright.async_api import Page
from pydantic import BaseModel, Field

from mcp_flow import Flow, workflow

LARGE = 100
PAGE = "data:text/html," + quote(
    """<title>Refunds</title><h1>Refund</h1><form onsubmit="event.preventDefault();
done.value = `${amount.value} refunded for ${order.value}`">
<label>Order <input id=order></label> <label>Amount <input id=amount></label> <button>Refund</button></form>
<p><output id=done></output>"""
)


class Refund(BaseModel):
    """Which order, and how much of it."""

    order: str
    amount: int = Field(gt=0)


class Outcome(BaseModel):
    """What was done; `said` is the page's word, or the note of who denied it."""

    refunded: bool
    said: str


@workflow
async def refund(flow: Flow, request: Refund) -> Outcome:
    """Refund an order; a person decides about large amounts, for two days at most."""
    page = await flow.page()
    await flow.step("open form", page.goto, PAGE, restore=True)
    await flow.step("fill in", fill_in, page, request.order, request.amount)
    if request.amount >= LARGE:
        decision = await flow.approve(
            f"Refund {request.amount} for order {request.order}?",
            data=request,
            by="human",
            expires=2 * 24 * 3600,
            on_deny="return",
        )
        if not decision:
            return Outcome(refunded=False, said=decision.note or "denied")
    return Outcome(refunded=True, said=await flow.step("refund", send, page, once=True))


async def fill_in(page: Page, order: str, amount: int) -> None:
    """Fill in the form without sending it."""
    await page.get_by_label("Order").fill(order)
    await page.get_by_label("Amount").fill(str(amount))


async def send(page: Page) -> str:
    """Send the form, and return what the page said."""
    await page.get_by_role("button", name="Refund").click()
    return await page.get_by_role("status").inner_text()
