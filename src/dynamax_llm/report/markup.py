"""HTML from nested calls. Text is escaped unless it is Markup already, so data can never become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

#: Elements without content.
_VOID = frozenset({"meta", "link", "br", "hr"})


class Markup(str):
    """Text that is HTML already. Only ``tag``, ``join`` and the page's own files make it."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """``<name …>children</name>``. ``class_`` is class, ``data_x`` is data-x; None and False are left out."""
    given = (item for item in attributes.items() if item[1] is not None and item[1] is not False)
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in given)}>"
    return Markup(opened if name in _VOID else f"{opened}{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Children one after another; text is escaped, None is nothing."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int):
        return Markup(html.escape(str(children)))
    return Markup("".join(join(child) for child in children))


def slug(*words: str) -> str:
    """Words as one name for ids and files: ``Mamba 7B``, ``f1`` is ``mamba-7b-f1``."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") or "x"


def scrolling(label: str, *children: Child) -> Markup:
    """A box of its own that scrolls sideways, by keyboard too, so that the page need not."""
    return tag("div", *children, class_="scroll", role="region", aria_label=label, tabindex=0)


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
