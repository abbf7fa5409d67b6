"""Names to objects: what is registered from outside is found, what is unknown or taken is refused."""

from __future__ import annotations

import pytest

from dynamax_llm.errors import UsageError
from dynamax_llm.registry import Registry


def test_entries_can_be_added_and_are_found_in_their_order() -> None:
    things: Registry[object] = Registry("thing", {"one": 1})
    two = object()
    things.register("two", two)
    things.register("two", two)  # the same again: a module imported twice
    assert list(things) == ["one", "two"]
    assert things.lookup("two") is two


def test_a_taken_name_is_refused() -> None:
    things: Registry[str] = Registry("thing", {"one": "first"})
    with pytest.raises(UsageError, match=r"thing 'one' is registered already, as 'first'.*another name; taken: one\."):
        things.register("one", "second")
    assert things["one"] == "first"


def test_an_unknown_name_is_refused_with_the_nearest_and_all() -> None:
    things: Registry[int] = Registry("thing")
    things.register("softmax", 1)
    things.register("entropy", 2)
    with pytest.raises(UsageError, match=r"thing 'sofmax'\. Did you mean 'softmax'\? Available: softmax, entropy"):
        things.lookup("sofmax")
