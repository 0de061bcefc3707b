"""What of a page is secret: its fields, by what they are named, and card numbers wherever they stand."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.async_api import Page
from seeing import Eyes

from mcp_flow.page.exec_js import evaluate
from mcp_flow.page.guard import HIDDEN, read_secrets
from mcp_flow.secrets import SECRET_FIELDS, hide_cards, is_card

pytestmark = pytest.mark.anyio

SECRET = """
type=password | type=PASSWORD | autocomplete=cc-number | autocomplete='billing CC-CSC' | autocomplete=one-time-code
name=cardnumber | id=card-number | name=cardNumber | name=card_num | name='payment[card_number]' | id=cc-num
name=ccnum | placeholder='Card number' | aria-label='Credit card number' | type=tel name=cardnumber
name=cvv2 | type=number id=cvc | id=card-cvc | placeholder='CVC / CVV' | name=csc | name=cardCsc | id=securityCode
name=otp | id=otp-3 | name=otpCode | name=userOtp | name=sms_otp | placeholder='Enter OTP' | aria-label='OTP code'
id=totp | name=mfa_code | name=login-2fa | placeholder='One-time code' | id=oneTimePassword | name=smsCode
aria-label='Verification code' | id=two-factor | name=passcode | placeholder='Security code'
name=pin | id=pin-code | name=pincode | name=card_pin | name=loginPin | placeholder='PIN' | placeholder='Your PIN'
name=password | id=new-password-2 | name='user[password]' | name=passwd | id=pw | name=userPwd
placeholder='Your password'""".replace("\n", " | ").split(" | ")[1:]
ORDINARY = """
name=discount-card-colour | name=opinion | name=shipping | id=shipping-address | name=spinner | id=pinned-note
name=cardholder | name='cardholder-name' | id=hotpink | name=footprint | name=hotplate | name=option | name=card
name=discount-code | id=postcode | name=country-code | name=code | name=number | name=order-number
placeholder='Search cards' | placeholder='Shipping code' | aria-label='Your opinion' | placeholder='Pin a note'
name=expiry | name=cc-exp | autocomplete=cc-exp | autocomplete=cc-name | name=timestamp | name=username | name=email
type=email name=forgot-password-email | type=checkbox id=show-password | type=submit name=password value=Send
type=hidden name=needs_password | type=radio name=pin | placeholder='One time donation' | name=captain
name=a2fa93 | name=phone-number""".replace("\n", " | ").split(" | ")[1:]


async def test_fields_are_secret_by_type_autocomplete_and_name_and_ordinary_ones_are_not(page: Page) -> None:
    fields = [*SECRET, *ORDINARY]
    await page.set_content("".join(f"<input {attributes} data-n={n}>" for n, attributes in enumerate(fields)))
    number = "fields => fields.map(field => Number(field.dataset.n))"
    found = await page.locator(SECRET_FIELDS).evaluate_all(number)
    assert sorted(found) == list(range(len(SECRET)))
    assert (
        await page.evaluate(f"selector => ({number})([...document.querySelectorAll(selector)])", SECRET_FIELDS) == found
    )
    await page.set_content("<textarea name=otp></textarea><textarea name=opinion></textarea><select name=pin></select>")
    assert await page.locator(SECRET_FIELDS).count() == 1


async def test_a_field_that_was_secret_stays_so_when_the_page_shows_what_was_typed(page: Page) -> None:
    await page.set_content("""<input type=password id=a aria-label=first value=hunter22><p id=p></p>
        <input type=password id=b aria-label=second value=x><input aria-label=other value=x>""")
    see = Eyes(page)
    await see()
    names = "Object.getOwnPropertyNames(window).length + Object.keys(window).length"
    before = await page.evaluate(names)
    await page.evaluate("for (const field of [a, b]) field.type = 'text'; p.textContent = 'you typed ' + a.value")
    assert (await evaluate(page, "[a.value, b.value]")).value == [HIDDEN, HIDDEN]
    await page.evaluate("a.value = 'typed-in-clear'")

    text = (await see(mode="full")).text

    assert "hunter22" not in text
    assert "typed-in-clear" not in text
    assert '"second" [ref=' in text
    assert text.count(f": {HIDDEN}") == 2, "a short value is hidden in its own field"
    assert '"other"' in text
    assert ": x\n" in text, "and shown in another"
    await page.evaluate("a.remove()")
    assert {"hunter22", "typed-in-clear", "x"} <= (await read_secrets(page)).values
    assert await page.evaluate(names) == before


CARDS = """4111111111111111 | 4222222222222 | 5555555555554444 | 2223003122003222 | 378282246310005 | 30569309025904
6011111111111117 | 3530111333300000 | 6200000000000005 | 4917610000000000003 | 6759649826438453 | 2200000000000004
4111 1111 1111 1111 | 4111-1111-1111-1111 | 4111\xa01111\xa01111\xa01111 | 3782 822463 10005 | 3056-930902-5904
4917 6100 0000 0000 003""".replace("\n", " | ").split(" | ")
NO_CARDS = """4111111111111112 | 4111 1111 1111 1112 | 4111 1111-1111 1111 | 41 11 11 11 11 11 11 11
0.4111111111111111 | 4111111111111111.5 | 1700000000000 | 1700000000000000 | 2026-11-28 08:15:00 | +49 30 1234567890
9111111111111111 | 0000000000000000 | 411111111111 | 4111  1111  1111  1111 | 5000 0000 0000 0000
41111111111111111111111""".replace("\n", " | ").split(" | ")


@pytest.mark.parametrize("card", CARDS)
def test_card_numbers_are_hidden_wherever_they_stand(card: str) -> None:
    assert hide_cards(card) == HIDDEN
    assert hide_cards(f'pay with "{card}", or n={card}&x') == f'pay with "{HIDDEN}", or n={HIDDEN}&x'
    assert hide_cards(f"exp 1234 {card}.") == f"exp 1234 {HIDDEN}."


@pytest.mark.parametrize("text", NO_CARDS)
def test_other_numbers_are_not(text: str) -> None:
    assert hide_cards(text) == text
    assert hide_cards(f"order {text} is") == f"order {text} is"


@given(st.integers(0, 10**19 - 1).map(str), st.sampled_from(["", " ", "-"]))
def test_a_number_is_hidden_only_if_it_can_be_one(digits: str, parting: str) -> None:
    grouped = parting.join(digits[at : at + 4] for at in range(0, len(digits), 4))
    assert hide_cards(grouped) in ((HIDDEN,) if is_card(digits) and hide_cards(grouped) != grouped else (grouped,))
    if len(digits) == 16:
        assert (hide_cards(grouped) == HIDDEN) is is_card(digits)


@given(st.integers(10**12, 2 * 10**12 - 1), st.sampled_from([1, 1000, 10**6]))
def test_no_time_since_the_epoch_is_taken_for_a_card(milliseconds: int, factor: int) -> None:
    assert hide_cards(f"at {milliseconds * factor}") == f"at {milliseconds * factor}"


@given(st.text())
def test_text_without_a_card_is_left_as_it_is(text: str) -> None:
    assert hide_cards(text) == text


async def test_card_numbers_are_hidden_in_looks_values_console_lines_and_errors(page: Page) -> None:
    await page.set_content(f"<title>{CARDS[0]}</title><p>card {CARDS[0]}</p><input aria-label=x value='{CARDS[-1]}'>")
    seen = await Eyes(page)(mode="full")
    assert "111111" not in seen.text
    assert seen.text.count(HIDDEN) == 3
    code = f"console.log('{CARDS[0]}'); return [{CARDS[0]}, 1700000000000, {{'{CARDS[0]}': 'n {CARDS[0]}'}}]"
    result = await evaluate(page, code, mode="write")
    assert result.value == [HIDDEN, 1700000000000, {HIDDEN: f"n {HIDDEN}"}]
    assert result.console == (f"log: {HIDDEN}",)


def test_a_long_text_is_searched_for_cards_in_no_time() -> None:
    began = time.perf_counter()
    hide_cards("1234 5678 9012 3456 text 2026-11-28 " * 10_000)
    hide_cards("4" * 100_000)
    hide_cards("4111 " * 20_000)
    hide_cards("4111111111111111 " * 20_000)
    assert time.perf_counter() - began < 5
