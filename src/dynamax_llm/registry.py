"""Names to objects, with a helpful refusal: the one way DYNAMAX looks up anything a user spells."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from dynamax_llm.errors import UsageError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Named things of one kind; ``lookup`` refuses unknown names with a suggestion, ``register`` adds one."""

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, entry: T) -> None:
        """Add an entry. Raises UsageError if the name belongs to another object."""
        if self._entries.get(name, entry) is not entry:
            raise UsageError(f"the {self.kind} {name!r} exists already. Choose another name.")
        self._entries[name] = entry

    def lookup(self, name: str) -> T:
        """The entry called ``name``. Raises UsageError naming the value, the nearest entry and all of them."""
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self._entries)}.")
