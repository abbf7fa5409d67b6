"""Names to objects, with a helpful refusal: the one way DYNAMAX looks up anything a user spells."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from dynamax_llm.errors import UsageError

T = TypeVar("T")


class _Home(str):
    """Where an entry is defined, "module:attribute", until it is used."""


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind, in the order they were registered; ``lookup`` refuses unknown names.

    ``homes``: entries that are imported when they are first used, as "module:attribute", so that their names are
    known without importing anything.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, T] | None = None, homes: Mapping[str, str] | None = None
    ) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {name: _Home(place) for name, place in (homes or {}).items()}
        self._entries.update(entries or {})

    def register(self, name: str, entry: T) -> None:
        """Add an entry, from anywhere. Raises UsageError if another entry has this name."""
        if name in self._entries and self[name] is not entry:
            raise UsageError(
                f"{self.kind} {name!r} is registered already, as {self[name]!r}. Register yours under another "
                f"name; taken: {', '.join(self._entries)}."
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        entry = self._entries[name]
        if isinstance(entry, _Home):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, name: str) -> T:
        """The entry called ``name``. Raises UsageError naming the value, the nearest entry and all of them."""
        if name in self._entries:
            return self[name]
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self._entries)}.")
