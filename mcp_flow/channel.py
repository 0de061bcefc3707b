"""Who makes a move from outside a run, and by what way. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Channel:
    """Who makes a move and by what way: journaled with it. `human` is proof of a person, never a model's word."""

    by: str = "agent"
    via: str = "tool"
    human: bool = False
