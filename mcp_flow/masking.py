"""What one attempt knows to be secret: what it was given by name or as an answer, and has seen in its pages' fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from mcp_flow.config import Settings
from mcp_flow.errors import StepResultError
from mcp_flow.page.guard import Secrets as FieldSecrets
from mcp_flow.pages import Pages
from mcp_flow.secrets import Secrets, masked, reveal, secret_places
from mcp_flow.store import Store


class Masking:
    """Gives an attempt its secrets, and hides them in what it writes."""

    def __init__(self, settings: Settings, store: Store, run_id: str, pages: Pages) -> None:
        self._store = store
        self._run_id = run_id
        self._pages = pages
        self._secrets = Secrets(settings.home)
        self._answers: dict[str, str] = {}
        self._given: dict[str, str] = {}
        self._fields = FieldSecrets()

    # --- what is known ---

    async def learn(self) -> None:
        """Take in the home folder's secrets, and those that were given as answers."""
        self._secrets.learn()
        await self.learn_answers()

    async def learn_answers(self) -> None:
        """Take in the secrets that were given as answers, and mask them from now on."""
        self._answers = await self._store.secret_answers(self._run_id)
        for reference, value in self._answers.items():
            self._secrets.know(reference, value)

    async def learn_fields(self) -> None:
        """Take in what the secret fields of the pages hold, as far as the pages tell, and mask it from now on."""
        self._fields = self._fields | await self._pages.secrets()

    @property
    def values(self) -> list[str]:
        """All that is secret, as far as that is known."""
        return [*self._secrets.known.values(), *self._fields.values]

    # --- what the code gets ---

    def secret(self, name: str) -> str:
        """`Flow.secret`."""
        self._given[name] = self._secrets.get(name)
        return self._given[name]

    def reveal(self, value: Any, schema: Any) -> Any:
        """An answer to what asked for this schema, with the secrets that it refers to."""
        if places := secret_places(schema):
            # In the order in which the code gets them, so that a step has one fingerprint in every attempt.
            text = json.dumps(value)
            self._given |= {name: secret for name, secret in self._answers.items() if name and name in text}
        return reveal(value, places, self._answers)

    # --- what is written ---

    def mask(self, text: str) -> str:
        """`text` without what is secret, as far as that is known."""
        return self._fields.hide(self._secrets.mask(text))

    @property
    def mask_given(self) -> Callable[[str], str] | None:
        """Masks what the code has got in this attempt, and nothing else; None where it has got nothing."""
        return partial(masked, known=self._given) if self._given else None

    def holds_secret(self, text: str) -> bool:
        """Whether JSON holds one of the secrets that have a name."""
        return bool(self._secrets.held_in_json(text))

    def refuse(self, text: str, what: str) -> None:
        """Raises `StepResultError` for JSON that holds a secret."""
        for name in self._secrets.held_in_json(text):
            raise StepResultError(f"The secret {name!r} is in {what}; it was not journaled.")

    def held_in(self, content: bytes) -> list[str]:
        """The names of the secrets that these bytes hold."""
        return list(self._secrets.held_in(content))
