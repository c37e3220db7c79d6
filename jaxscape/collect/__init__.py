"""Prompts in, states of every layer and answers out; shared prefixes run once."""

from jaxscape.collect.collected import Collected, collect

__all__ = ["Collected", "collect"]
