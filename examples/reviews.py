"""A piece of judgement, given to the agent that drives the workflow.

What a program reads from a page it can count; whether a review is friendly it can not tell. `by="agent"` asks the
agent, which has the page open to `snapshot` meanwhile, and the answer is journaled like any other.
"""

from typing import Literal
from urllib.parse import quote

from playwright.async_api import Page
from pydantic import BaseModel

from mcp_flow import Flow, workflow

PAGE = "data:text/html," + quote(
    """<title>Reviews</title><h1>Reviews</h1>
<article><h2>Ada</h2><p>It pours without a drip. I bought a second one.</p></article>
<article><h2>Bob</h2><p>The lid broke on the first day, and nobody answers my mails.</p></article>"""
)


class Verdict(BaseModel):
    """How a review is meant, and why the agent thinks so."""

    mood: Literal["friendly", "angry", "neither"]
    because: str


@workflow
async def reviews(flow: Flow) -> dict[str, Verdict]:
    """Read the reviews of a product, and have the agent judge each of them."""
    page = await flow.page()
    await flow.step("open reviews", page.goto, PAGE, restore=True)
    names = await flow.step("read names", read_names, page)
    return {name: await flow.ask(f"How does {name} mean it?", Verdict, by="agent") for name in names}


async def read_names(page: Page) -> list[str]:
    """Who wrote the reviews."""
    return await page.get_by_role("article").get_by_role("heading").all_inner_texts()
