"""Messages are tested by the facts in them, not by whole sentences. Not a test."""

from __future__ import annotations


def has_facts(message: str, facts: str) -> bool:
    """Whether the message has all facts, in this order. `facts` separates them by ` … `."""
    at = 0
    for fact in facts.split(" … "):
        found = message.find(fact, at)
        if found < 0:
            return False
        at = found + len(fact)
    return True
