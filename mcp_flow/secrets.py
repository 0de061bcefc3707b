"""Secrets by name, and keeping their values out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from mcp_flow.errors import StepError

_AUTOCOMPLETE = ("cc-number", "cc-csc", "one-time-code", "current-password", "new-password")
_PHRASES = (
    ("card", "num"),
    ("cc", "num"),
    ("security", "code"),
    ("verification", "code"),
    ("authentication", "code"),
    ("sms", "code"),
    ("one", "time", "code"),
    ("one", "time", "pass"),
    ("one-time", "code"),
    ("one-time", "pass"),
    ("two", "factor"),
)
"""What names a secret field wherever it stands, its words written together or parted by `-`, `_` or a space."""
_PARTS = ("cvc", "cvv", "totp", "passcode", "passphrase", "passwd")
"""The same in one word, which is part of no other."""
_WORDS = ("otp", "pin", "csc", "mfa", "2fa")
"""Part of many others, such as "shipping" and "hotplate": only where they stand alone."""
_NEVER_TYPED = (
    "button checkbox color date datetime-local email file hidden image month radio range reset submit time week".split()  # noqa: SIM905
)


def _marks() -> Iterator[str]:
    """How the attributes of a field say that it is for a secret, as CSS selectors, one for each attribute."""
    yield _marked("autocomplete", (f'~="{word}' for word in _AUTOCOMPLETE))
    parts = [*_PARTS, *(parting.join(words) for words in _PHRASES for parting in ("", "-", "_", " "))]
    anywhere = [*(f'*="{part}' for part in parts), *(f'="{word}' for word in (*_WORDS, "pwd", "pw"))]
    spelled = [*(f'*="{part}' for part in ("password", "pincode")), '^="otp']
    spelled += [at for word in _WORDS for at in _standing_alone(word)]
    # In camelCase, which has no other borders.
    camel = ('*="Otp', '$="Pin', '*="PinCode', '$="Pwd', '$="Csc')
    for attribute in ("name", "id"):
        yield _marked(attribute, [*anywhere, *spelled], camel)
    said = [at for word in _WORDS for at in (f'$=" {word}', f'^="{word} code')]
    for attribute in ("aria-label", "placeholder"):
        yield _marked(attribute, [*anywhere, '$="password', *said])


def _marked(attribute: str, any_case: Iterable[str], as_written: Iterable[str] = ()) -> str:
    # By attribute, because most fields have few of them: each would be asked for two hundred otherwise.
    tests = [*(f'[{attribute}{at}" i]' for at in any_case), *(f'[{attribute}{at}"]' for at in as_written)]
    return f"[{attribute}]{_any(tests)}"


def _any(selectors: Iterable[str]) -> str:
    # `:is` by a name that Playwright leaves to the browser: its own tries hundreds of selectors on each field.
    return f":-webkit-any({', '.join(selectors)})"


def _standing_alone(word: str) -> Iterator[str]:
    for parting in "-_":
        yield from (f'^="{word}{parting}', f'$="{parting}{word}', f'*="{parting}{word}{parting}')


def _secret_fields() -> str:
    marked = _any(_marks())
    typed = ", ".join(f"[type={kind}]" for kind in _NEVER_TYPED)
    return f"input[type=password], input:not({typed}){marked}, textarea{marked}"


SECRET_FIELDS = _secret_fields()
"""The fields of a page whose values nobody is shown, as a CSS selector: for passwords, card numbers, their codes,
one-time codes and PINs, as their type, `autocomplete` or what they are named says."""
HIDDEN = "[hidden]"
_DEEPEST = 12
_SHORTEST_MASKED = 4
"""Shorter values occur within words and numbers by chance; they count where they stand alone in a text."""
_SHORTEST = 2
"""A single character stands alone everywhere; masking it would only tell what it is."""
_SHORTEST_SURE = 8
"""A value of this length is no other's by chance: where it stands, the secret stands, asked for or not."""
_CARD = re.compile(
    r"[0-9](?<![0-9]{2})(?<![0-9]\.[0-9])"
    r"(?:[0-9]{12,18}|[0-9]{3}([ \xa0-])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5}))"
    r"(?![0-9]|\.[0-9])"
)
"""What may be a card number: 13 to 19 digits, in one or in the groups in which they are usually written."""
_ISSUERS = (
    (r"4", (13, 16, 19)),  # Visa
    (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
    (r"3[47]", (15,)),  # American Express
    (r"30[0-5]|3[689]", range(14, 20)),  # Diners Club
    (r"6011|64[4-9]|65|62|352[89]|35[3-8]|220[0-4]", range(16, 20)),  # Discover, UnionPay, JCB, Mir
    (r"5018|5020|5038|5893|6304|6759|676[1-3]", range(13, 20)),  # Maestro
)
"""How the numbers of an issuer's cards begin, and of how many digits they are."""


Place = tuple[str, ...]
REFERENCE = "$secret"
_VARIABLE = "MCP_FLOW_SECRET_"


def secret_places(schema: Any) -> list[Place]:
    """Where in a value of this JSON Schema a secret stands: the paths of what pydantic types `SecretStr`.

    Through objects, references and choices; `*` stands for every item of a list and every value of a dict.
    """
    return list(dict.fromkeys(_places(schema, schema, (), 0)))


def _places(whole: Any, schema: Any, path: Place, depth: int) -> Iterator[Place]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return
    if schema.get("writeOnly") and schema.get("format") == "password":
        yield path
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/$defs/"):
        yield from _places(whole, whole.get("$defs", {}).get(reference.removeprefix("#/$defs/")), path, depth + 1)
    for word in ("anyOf", "allOf", "oneOf"):
        for choice in schema.get(word, ()):
            yield from _places(whole, choice, path, depth + 1)
    for name, part in schema.get("properties", {}).items():
        yield from _places(whole, part, (*path, name), depth + 1)
    patterns = schema.get("patternProperties", {}).values()
    for part in (schema.get("items"), schema.get("additionalProperties"), *schema.get("prefixItems", ()), *patterns):
        yield from _places(whole, part, (*path, "*"), depth + 1)


def set_apart(value: Any, places: Sequence[Place], new_reference: Callable[[], str]) -> tuple[Any, dict[str, str]]:
    """`value` with a reference in the place of each secret, and the secrets by reference."""
    kept: dict[str, str] = {}

    def apart(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        reference = new_reference()
        kept[reference] = value
        return {REFERENCE: reference}

    return _changed(value, places, apart), kept


def reveal(value: Any, places: Sequence[Place], kept: Mapping[str, str]) -> Any:
    """`value` with the secrets in the places of their references; raises `StepError` for one that is erased.

    Elsewhere a reference is an answer like any other: who knows one must not get at its secret by giving it.
    """

    def found(value: Any) -> Any:
        if not isinstance(value, Mapping) or value.keys() != {REFERENCE}:
            return value
        if (reference := value[REFERENCE]) not in kept:
            raise StepError("A secret that was given as an answer is erased; its question must be asked again.")
        return kept[reference]

    return _changed(value, places, found)


def _changed(value: Any, places: Sequence[Place], change: Callable[[Any], Any]) -> Any:
    """`value` with what stands in these places changed."""
    if () in places:
        return change(value)
    match value:
        case Mapping() if places:
            return {
                name: _changed(item, [p[1:] for p in places if p[0] in (name, "*")], change)
                for name, item in value.items()
            }
        case list() if places:
            return [_changed(item, [p[1:] for p in places if p[0] == "*"], change) for item in value]
        case _:
            return value


def masked(text: str, known: Mapping[str, str]) -> str:
    """`text` with the value of every secret in it, by name, replaced by that name."""
    for name, value in known.items():
        for form in _forms(value):
            text = text.replace(form, f"[secret {name}]")
        if alone := _alone(value):
            text = alone.sub(lambda _, name=name: f"[secret {name}]", text)  # type: ignore[misc]
    return text


def hide_cards(text: str) -> str:
    """`text` with every card number in it hidden: what an issuer may have given out, its check digit right."""
    shown, done, at = "", 0, 0
    while found := _CARD.search(text, at):
        at = found.start() + 1  # should this be none, one may begin in its later groups
        if is_card(re.sub(r"\D", "", found[0])):
            shown += text[done : found.start()] + HIDDEN
            done = at = found.end()
    return shown + text[done:] if done else text


def is_card(digits: str) -> bool:
    """Whether these are the digits of a card number, by its issuer, length and check digit."""
    if not any(len(digits) in lengths and re.match(begin, digits) for begin, lengths in _ISSUERS):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def masked_in(value: Any, known: Mapping[str, str]) -> Any:
    """A JSON value with all its texts `masked`."""
    match value:
        case str():
            return masked(value, known)
        case dict():
            return {masked(name, known): masked_in(item, known) for name, item in value.items()}
        case list():
            return [masked_in(item, known) for item in value]
        case _:
            return value


def names_in(value: Any, known: Mapping[str, str]) -> list[str]:
    """The names of the secrets that stand in a JSON value, however they are written; a short one alone in a text."""
    texts = "\n".join(_texts(value))
    everything = f"{json.dumps(value)}\n{texts}"
    return [
        name
        for name, secret in known.items()
        if any(form in everything for form in _forms(secret)) or ((alone := _alone(secret)) and alone.search(texts))
    ]


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for name, item in value.items():
                yield name
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


@cache
def _alone(value: str) -> re.Pattern[str] | None:
    """Where a short secret stands alone; None for one that is long, or too short to be one."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)") if _SHORTEST <= len(value) < _SHORTEST_MASKED else None


@cache
def _forms(value: str) -> tuple[str, ...]:
    """How a secret may be written: as it is, in JSON, in an address. Those of a short one are none."""
    if len(value) < _SHORTEST_MASKED:
        return ()
    text = value.encode("utf-8", "replace")
    return tuple(dict.fromkeys((value, json.dumps(value)[1:-1], quote(text, safe=""), quote_plus(text))))


class Secrets:
    """The secrets of a home folder; what was asked for or learned is masked from then on."""

    def __init__(self, home: Path) -> None:
        self._file = home / "secrets.toml"
        self._known: dict[str, str] = {}
        self._asked: set[str] = set()

    def get(self, name: str) -> str:
        """The value of a secret; raises `StepError` when there is none or its file is open to others."""
        variable = _VARIABLE + re.sub(r"\W", "_", name).upper()
        value = os.environ.get(variable) or self._read().get(name)
        if not isinstance(value, str) or not value:
            raise StepError(f"There is no secret {name!r}: set {variable}, or put it into {self._file} (mode 0600).")
        self.know(name, value)
        return value

    def values(self) -> dict[str, str]:
        """All secrets of this process and home folder by name, asked for or not: whoever shows a page hides them.

        Also those of a file that nobody may ask, because it is open to others.
        """
        everything = dict(self._known)
        for name, value in (*_of_environment().items(), *self._found().items()):
            if isinstance(value, str) and value and value not in everything.values():
                everything[name if name not in everything else f"{name} in {self._file.name}"] = value
        return everything

    def learn(self) -> None:
        """Mask all of `values` from now on."""
        self._known = self.values()

    @property
    def known(self) -> dict[str, str]:
        """Those that were asked for or learned, by name."""
        return dict(self._known)

    def know(self, name: str, value: str) -> None:
        """Mask this value from now on, as that of the secret `name`, which the run has."""
        # Under the name that the run has it by, should it have been learned under another.
        self._known = {name: value} | {other: held for other, held in self._known.items() if held != value}
        self._asked.add(name)

    def mask(self, text: str) -> str:
        """`text` with every known secret's value replaced by its name."""
        return masked(text, self._known)

    def held_in(self, content: bytes) -> list[str]:
        """The names of the secrets whose value stands in `content`, however it is written.

        One that the run has not asked for counts only where it is too long to stand there by chance.
        """
        return [
            name
            for name, value in self._sure().items()
            if any(form.encode("utf-8", "replace") in content for form in _forms(value))
        ]

    def held_in_json(self, text: str) -> list[str]:
        """The names of the known secrets whose value stands in a text of JSON."""
        return names_in(json.loads(text), sure) if (sure := self._sure()) else []

    def _sure(self) -> dict[str, str]:
        return {
            name: value for name, value in self._known.items() if name in self._asked or len(value) >= _SHORTEST_SURE
        }

    def _found(self) -> dict[str, object]:
        try:
            return tomllib.loads(self._file.read_text())
        except (OSError, ValueError):  # whoever asks for one of its secrets is told
            return {}

    def _read(self) -> dict[str, object]:
        try:
            mode = self._file.stat().st_mode & 0o077
        except FileNotFoundError:
            return {}
        if mode:
            raise StepError(f"{self._file} can be read by others. Run: chmod 600 {self._file}")
        try:
            return tomllib.loads(self._file.read_text())
        except tomllib.TOMLDecodeError as error:
            raise StepError(f"{self._file} is not TOML: {error}.") from error


def _of_environment() -> dict[str, str]:
    """The secrets of the environment, under the names by which workflows usually ask for them."""
    return {
        name.removeprefix(_VARIABLE).lower(): value for name, value in os.environ.items() if name.startswith(_VARIABLE)
    }
