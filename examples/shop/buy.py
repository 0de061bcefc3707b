"""Buy something in the demo shop, with a decision before the money goes.

Start the shop with `python examples/shop/server.py`, then start `buy` with its address as `url`.
"""

from typing import Annotated

from playwright.async_api import Page
from pydantic import BaseModel, Field

from mcp_flow import Flow, workflow

ACCOUNT, PASSWORD = "Ada", "demo"


class Order(BaseModel):
    """What to buy, and where."""

    item: Annotated[str, Field(min_length=1, description="a product's name as the shop writes it", examples=["Teapot"])]
    quantity: Annotated[int, Field(ge=1, le=10)] = 1
    url: Annotated[str, Field(pattern=r"^https?://", description="the shop's address")]


class Receipt(BaseModel):
    """What was bought."""

    number: str
    total: str
    item: str


# The demo's own shop: a private address is reached only where it is named.
@workflow(allow_origins=["http://127.0.0.1:*"])
async def buy(flow: Flow, order: Order) -> Receipt:
    """Buy one item in the demo shop; asks for approval once the total is known, then pays exactly once."""
    page = await flow.page()
    await flow.step("open shop", page.goto, order.url)
    await flow.step("sign in", sign_in, page, restore=True)
    await flow.step("add to cart", add_to_cart, page, order.item, order.quantity)
    total = await flow.step("read total", read_total, page, retries=2, timeout=10)
    await flow.approve(
        f"Pay {total} for {order.quantity} x {order.item}?",
        data={"item": order.item, "quantity": order.quantity, "total": total},
    )
    number = await flow.step("pay", pay, page, once=True)
    await flow.attach("receipt.png", await page.screenshot())
    return Receipt(number=number, total=total, item=order.item)


async def sign_in(page: Page) -> None:
    """Sign in, unless the session is still there: a restore step must do no harm when there is nothing to do."""
    if await page.get_by_role("button", name="Sign out").is_visible():
        return
    await page.get_by_role("link", name="Sign in").click()
    await page.get_by_label("Name").fill(ACCOUNT)
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("button", name="Sign in").click()
    await page.get_by_role("button", name="Sign out").wait_for()


async def add_to_cart(page: Page, item: str, quantity: int) -> None:
    """Put the item into the cart and go to the checkout."""
    names = await page.get_by_role("main").get_by_role("heading", level=2).all_inner_texts()
    if item not in names:
        raise ValueError(f"the shop has no {item!r}; it has {', '.join(names)}")
    await page.get_by_label(f"Quantity of {item}", exact=True).fill(str(quantity))
    await page.get_by_role("button", name=f"Add to cart: {item}", exact=True).click()
    await page.get_by_role("link", name="Go to checkout").click()


async def read_total(page: Page) -> str:
    """The total, as the shop writes it."""
    return await page.get_by_test_id("total").inner_text()


async def pay(page: Page) -> str:
    """Pay what is in the cart, and return the order's number."""
    await page.get_by_role("button", name="Pay").click()
    return await page.get_by_test_id("number").inner_text()
