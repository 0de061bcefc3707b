"""A sign-in that may need a code, which nobody knows before the site asks for it.

The step raises `Retriable` with the type of what would help. The run stops there, with its page open, and asks; with
the answer that step alone runs again. Nothing before it is repeated. A code is a secret: a person types it unseen, with
`mcp-flow answer`, and it stays out of the journal and out of what agents see.
"""

from urllib.parse import quote

from playwright.async_api import Page
from pydantic import SecretStr

from mcp_flow import Flow, Retriable, workflow

CODE = "424242"  # what the site has sent by mail, so to say
PAGE = "data:text/html," + quote(
    f"""<title>Sign in</title><h1>Sign in</h1><form onsubmit="event.preventDefault();
said.value = code.value === '{CODE}' ? 'Welcome back' : 'We have sent you a code by mail'">
<label>Code <input id=code></label> <button>Sign in</button></form><p><output id=said></output>"""
)


@workflow
async def login(flow: Flow) -> str:
    """Sign in; asks a person for the code from the mail when the site wants one."""
    page = await flow.page()
    await flow.step("open site", page.goto, PAGE, restore=True)
    return await flow.step("sign in", sign_in, flow, page)


async def sign_in(flow: Flow, page: Page) -> str:
    """Sign in with the code that somebody gave, if one was, and return the site's greeting."""
    await page.get_by_label("Code").fill(flow.retry_input or "")
    await page.get_by_role("button", name="Sign in").click()
    said = await page.get_by_role("status").inner_text()
    if "Welcome" not in said:
        raise Retriable(f"the site says: {said}", ask=SecretStr)
    return said
