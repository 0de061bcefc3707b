"""What is done by hand as lines of Python for the workflow: named variables, durable locators, no secrets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mcp_flow.secrets import HIDDEN, masked

if TYPE_CHECKING:
    from playwright.async_api import Page

    from mcp_flow.app import App
    from mcp_flow.run import Run


async def mask_of(app: App, run: Run) -> Callable[[str], str]:
    """Replaces secrets by their names, and hides those that were given as answers: authors have no name for them."""
    known, answers = await app.secrets_of(run), await app.store.secret_answers(run.run_id)

    def mask(text: str) -> str:
        text = masked(text, known)
        for reference in answers:
            text = text.replace(f"[secret {reference}]", HIDDEN)
        return text

    return mask


def variable_of(run: Run, page: str) -> tuple[str, str | None]:
    """What a page is called in the lines for the workflow, and the line that makes it so unless one before does."""
    from mcp_flow.page.statements import OPENED, variable

    popups = [name for name in run.pages if name.startswith("popup-")]
    if popups[-1:] == [page] and any(line.endswith(OPENED) for line in run.by_hand):
        return "popup", None
    return variable(page)


def lines_of(run: Run, page: str, statements: tuple[str, ...]) -> tuple[str, ...]:
    """Statements as they are recorded: none too long, the page's variable made before its first use."""
    from mcp_flow.page.statements import within

    _, making = variable_of(run, page)
    made = [making] if making and statements and making not in run.by_hand else []
    return (*made, *map(within, statements))


async def element_of(run: Run, live: Page, page: str, ref: str | None, locator: str | None) -> str | None:
    """How a workflow finds what is about to be evaluated by hand: the page, or an element of it that is there."""
    from playwright.async_api import Error

    from mcp_flow.page.guard import aside
    from mcp_flow.page.statements import escaped, literal

    found, _ = variable_of(run, page)
    if locator is not None:
        return f"{found}.locator({literal(locator)})"
    if ref is None:
        return found
    try:
        return f"{found}.{escaped(str(await aside(live, live.get_by_ref(ref).normalize)))}"
    except Error:  # there is no such element, which the evaluation says
        return None
