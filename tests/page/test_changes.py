"""Looks after the first: what is different, since when, and when the whole is shown again."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import Page
from seeing import CALL, KEY, Eyes, body, calls_in, inside, outside, refs_in

from mcp_flow.errors import InvalidInput
from mcp_flow.page.snapshot import changes, remember


@pytest.fixture
def page(own_page: Page) -> Page:
    """A page of its own for each test: refs and looks begin anew on it."""
    return own_page


pytestmark = pytest.mark.anyio

SHOP = (
    "<title>Shop</title><h1>Shop</h1><ul aria-label=Items>"
    + "".join(f"<li><a href='/{n}'>Item {n}</a></li>" for n in range(200))
    + "</ul><p id=count>0 in the cart</p><button onclick=\"count.textContent = '1 in the cart';"
    "document.body.insertAdjacentHTML('beforeend', '<div role=status>Added</div>')\">Add</button>"
)


@pytest.fixture
def see(page: Page) -> Eyes:
    return Eyes(page)


async def test_after_one_action_only_what_it_did_is_shown(see: Eyes) -> None:
    await see(SHOP)
    await see.page.get_by_role("button").click()

    text = (await see()).text

    assert len(text) < 600
    assert "look 2, changed since look 1: +1 ~1; pages: main" in outside(text)
    assert [re.sub(r" \[ref=\w+\]", "", line) for line in body(text)] == [
        "~ - paragraph: 1 in the cart",
        "+ - status: Added",
    ]
    for ref in refs_in(text):
        assert await see.page.get_by_ref(ref).count() == 1
    text = (await see()).text
    assert "look 3, changed since look 2: nothing" in text
    assert body(text) == []


async def test_what_is_gone_is_named_without_a_ref_and_what_came_stands_under_its_place(see: Eyes) -> None:
    await see(SHOP)
    await see.page.evaluate(
        "document.querySelectorAll('li')[150].remove();"
        "document.querySelectorAll('li')[20].insertAdjacentHTML('afterend', '<li><button>Fresh</button></li>')"
    )
    text = (await see()).text
    [context, gone, came] = body(text)
    assert re.fullmatch(r'  - list "Items" \[ref=\w+\]', context)
    assert gone == '-   - link "Item 150"'
    assert re.fullmatch(r'\+   - button "Fresh" \[ref=\w+\]', came)


async def test_any_remembered_look_can_be_compared_with(see: Eyes) -> None:
    await see(SHOP)
    for number in range(1, 4):
        await see.page.evaluate(f"count.textContent = '{number} in the cart'")
        await see()
    assert "changed since look 4: nothing" in (await see()).text
    text = (await see(since=1)).text
    assert "look 6, changed since look 1: ~1" in text
    assert "3 in the cart" in text
    await see.page.evaluate("count.textContent = '0 in the cart'")
    assert "changed since look 1: nothing" in (await see(since=1)).text
    with pytest.raises(InvalidInput, match="are: 1, 2, 3, 4, 5, 6, 7"):
        await see(since=99)


async def test_changes_can_be_narrowed_and_their_calls_go_on_comparing(see: Eyes) -> None:
    await see(SHOP)
    await see.page.evaluate(
        "document.querySelectorAll('a').forEach((a, n) => { if (n % 2) a.href = '/new' + n }); count.textContent = '7'"
    )
    text = (await see(since=1, find="paragraph")).text
    assert len(body(text)) == 1
    assert re.fullmatch(r"~ - paragraph \[ref=\w+\]: 7", body(text)[0])

    seen, refs = await see.follow(since=1, max_chars=1500)
    assert all(len(answer.text) <= 1500 for answer in seen)
    links = [await see.page.get_by_ref(ref).get_attribute("href") for ref in refs]
    assert {f"/new{n}" for n in range(1, 200, 2)} <= set(links)
    assert any("since" in arguments and "root" in arguments for arguments in calls_in(seen[0].text))


async def test_many_alike_additions_are_folded_and_reached(see: Eyes) -> None:
    await see(SHOP)
    rows = "".join(f"<li><button>New {n}</button></li>" for n in range(40))
    await see.page.evaluate("rows => document.querySelector('ul').insertAdjacentHTML('afterbegin', rows)", rows)
    text = (await see()).text
    assert "+40" in outside(text)
    assert re.search(r"\+   - button <<\w+: 36 more like it", inside(text))
    assert len(text) < 900
    fold = next(arguments for arguments in calls_in(text) if ".." in str(arguments.get("root")))
    assert 'button "New 39"' in (await see(**fold)).text


async def test_a_new_document_and_a_change_of_most_of_the_page_are_shown_whole(see: Eyes) -> None:
    await see(SHOP)
    await see.page.evaluate("document.body.innerHTML = '<h1>Sold out</h1><a href=/>Home</a>'")
    text = (await see()).text
    assert re.search(r"look 2, \d+% changed since look 1, shown whole", outside(text))
    assert len(body(text)) == 2
    await see.page.goto("data:text/html,<h1>Sold out</h1><a href=/>Home</a>")
    text = (await see()).text
    assert "look 3, of a new document, shown whole" in outside(text)
    await see.page.reload()
    assert "look 4, of a new document" in (await see()).text
    assert len(body((await see(mode="outline")).text)) == 2
    assert "of a new document" in (await see(since=1)).text


async def test_a_look_at_a_part_leaves_the_whole_to_compare_with(see: Eyes) -> None:
    await see(SHOP, find="Item 7")
    text = (await see()).text
    assert text.count("- link ") > 3, "nobody has seen the page as a whole yet"
    await see.page.get_by_role("button").click()
    await see(find="cart")
    text = (await see()).text
    assert "changed since look 2: +1 ~1" in text


async def test_the_answer_to_an_action_compares_with_the_look_right_before_it(see: Eyes) -> None:
    given = {"looks": see.looks, "key": KEY, "call": CALL}
    await see.page.set_content(SHOP)
    remembered = await remember(see.page, looks=see.looks, key=KEY)
    assert remembered.number == 1
    ref = next(line.ref for line in remembered.lines if line.name == "Add")
    assert ref
    await see.page.get_by_ref(ref).click()

    answer = await changes(see.page, **given)

    assert len(answer.text) < 400
    assert "look 2, changed since look 1: +1 ~1" in answer.text
    assert "1 in the cart" in inside(answer.text)
    line = see.looks.line(KEY, ref)
    assert line
    assert (line.role, line.name) == ("button", "Add")

    other = ("r2", "main")
    fresh = await changes(see.page, looks=see.looks, key=other, call=CALL)
    assert "- heading" in fresh.text, "with nothing to compare with it is an outline"
