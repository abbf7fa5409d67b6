"""A page as a browser's parser would see it: elements in order, each with its attributes and all the text inside."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "link", "br", "hr")


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    pieces: list[str] = field(default_factory=list)
    inside: list[Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def all(self, name: str, class_: str | None = None) -> list[Element]:
        """Elements of a name below this one, in order."""
        found = [item for item in self.inside if item.name == name]
        return [item for item in found if class_ is None or class_ in (item.attributes.get("class") or "").split()]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        for parent in self.open:
            parent.inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for parent in self.open:
            parent.inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        closed = self.open.pop()
        assert closed.name == tag, f"<{closed.name}> closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        for parent in self.open:
            parent.pieces.append(data)


def read(text: str) -> Element:
    """The whole page. Fails where elements do not nest."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], [item.name for item in reader.open]
    return reader.root
