"""Three questions, one after another, and a form that is filled in with the answers.

Whoever answers takes as long as they like: the run waits in the journal, not in a process.
"""

from typing import Annotated, Literal

from playwright.async_api import Page
from pydantic import BaseModel, Field

from mcp_flow import Flow, workflow

Email = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="an e-mail address")]
Plan = Literal["free", "team", "company"]

FORM = """<!doctype html><html lang="en"><title>Sign up</title>
<style>body { font: 16px/1.5 system-ui, sans-serif; max-width: 24rem; margin: 3rem auto } label { display: block;
margin-top: 1rem } [type=email], select { font: inherit; width: 100%; padding: .4rem } button { font: inherit;
margin-top: 1rem; padding: .4rem 1rem }</style>
<h1>Sign up</h1>
<form onsubmit="event.preventDefault();
  done.value = `${email.value}: ${plan.value}${news.checked ? ', newsletter' : ''}`">
<label>E-mail <input id="email" type="email" required></label>
<label>Plan <select id="plan"><option>free</option><option>team</option><option>company</option></select></label>
<label><input id="news" type="checkbox"> Send me the newsletter</label>
<button>Sign up</button></form><p><output id="done"></output></p></html>"""


class Account(BaseModel):
    """What was signed up for; `confirmation` is what the page said."""

    email: Email
    plan: Plan
    newsletter: bool
    confirmation: str


@workflow
async def signup(flow: Flow) -> Account:
    """Sign up for an account; asks for the e-mail address, the plan and the newsletter, one after another."""
    page = await flow.page()
    await flow.step("open form", page.set_content, FORM, restore=True)
    email = await flow.ask("Which e-mail address?", Email)
    plan = await flow.ask("Which plan?", Plan)
    newsletter = await flow.ask("Subscribe to the newsletter?", bool)
    confirmation = await flow.step("send form", send_form, page, email, plan, newsletter)
    return Account(email=email, plan=plan, newsletter=newsletter, confirmation=confirmation)


async def send_form(page: Page, email: str, plan: str, newsletter: bool) -> str:
    """Fill in the form, send it, and return the page's confirmation."""
    await page.get_by_label("E-mail").fill(email)
    await page.get_by_label("Plan").select_option(plan)
    await page.get_by_label("Send me the newsletter").set_checked(newsletter)
    await page.get_by_role("button", name="Sign up").click()
    return await page.get_by_role("status").inner_text()
