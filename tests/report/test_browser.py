"""The page in a real browser: silent, alone, readable in light and dark, at a desk, on a phone and on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.report.browser import find_browser

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 800}
SECTIONS = ("verdict", "fronts", "tables", "depth", "texts", "reliability", "promises", "measured", "runs")

#: Text colour, and the ground it stands on: the first ancestor that is not transparent.
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (seen.has(node) || !walker.currentNode.data.trim() || node.closest("script, style, [hidden], .jump")) continue;
    seen.add(node);
    const style = getComputedStyle(node);
    const inside = node.closest("svg");
    const pair = [light(rgb(inside ? style.fill : style.color)), light(ground(node))].sort((a, b) => b - a);
    const name = inside ? "svg text" : `${node.localName}.${node.className}`;
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (node.textContent !== "■") found[name] = Math.min(found[name] ?? 99, contrast);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_browser()
    assert path, "no Chromium found: set DYNAMAX_CHROMIUM, or see the browser rule of the Makefile"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, page) -> Iterator[Any]:
    """Opens the page; afterwards nothing may have been said on the console, and nothing asked for but the file."""
    noise: list[str] = []
    contexts = []

    def open_at(viewport: dict[str, int] = DESK, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: noise.append(f"error: {error}"))
        tab.on("request", lambda request: noise.append(request.url) if request.url != page.as_uri() else None)
        tab.goto(page.as_uri())
        return tab

    yield open_at
    for context in contexts:
        context.close()
    assert noise == []


def test_nothing_overflows_and_everything_can_be_read(opened):
    tab = opened()
    for viewport in (DESK, PHONE):
        tab.set_viewport_size(viewport)
        assert tab.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        assert all(tab.locator(f"#{name}").is_visible() for name in SECTIONS)
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        contrasts = tab.evaluate(CONTRASTS)
        assert {"p.", "svg text", "small.", "td.", "td.bad", "th.", "dt."} <= contrasts.keys()
        assert sum(name.startswith("span.t d") for name in contrasts) >= 5
        assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


def test_light_and_dark_differ_and_the_button_changes_them(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    tab = opened()
    white, written = tab.evaluate(ground), tab.evaluate(ink)
    tab.emulate_media(color_scheme="dark")
    black, chalk = tab.evaluate(ground), tab.evaluate(ink)
    assert white != black and written != chalk
    tab.emulate_media(color_scheme="light")
    button = tab.locator("#theme")
    # The page hears of the change in its own time; its policy forbids to wait by evaluating a string in it.
    expect(button).to_have_text("Dark", use_inner_text=True)
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Dark", "false")
    button.click()
    assert (tab.evaluate(ground), tab.evaluate(ink)) == (black, chalk)
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Light", "true")
    button.click()
    assert (tab.evaluate(ground), tab.evaluate(ink)) == (white, written)
    assert tab.evaluate("document.cookie") == ""


def test_a_token_shows_the_full_models_word(opened):
    tab = opened(PHONE)
    tip = tab.locator("#tip")
    text = tab.locator(".text").first
    assert not tip.is_visible()
    text.locator("span").nth(1).scroll_into_view_if_needed()
    text.locator("span").nth(4).hover()
    assert tip.inner_text() == "full model: ␣other\n14 of 16 layers"
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    text.locator("span").nth(5).hover()
    assert tip.inner_text() == "the full model says the same\n8 of 16 layers"
    tab.mouse.move(0, 0)
    assert not tip.is_visible()
    text.locator("span").first.focus()
    assert tip.inner_text().startswith("full model: ␣other") and tip.is_visible()
    for _ in range(4):
        tab.keyboard.press("ArrowRight")
    assert tip.inner_text() == "full model: ␣other\n14 of 16 layers"
    assert tab.locator(".text span[tabindex='0']").count() == tab.locator(".text").count()
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    text.locator("span").nth(8).click()
    assert tip.inner_text().startswith("full model: ␣other")


def test_tables_sort(opened):
    tab = opened()
    head = tab.locator("table.results").first.locator("th[aria-sort]").filter(has_text="speed-up")
    column = """(head) => [...head.closest("table").tBodies[0].rows]
        .map((row) => parseFloat(row.cells[head.cellIndex].dataset.v))"""
    before = head.evaluate(column)
    timed = [value for value in before if value == value]
    assert len(timed) == len(before) - 1 == 27  # the full model is not timed against itself
    for direction, wanted in (("descending", sorted(timed, reverse=True)), ("ascending", sorted(timed))):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == direction
        assert head.evaluate(column)[:-1] == wanted
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert [value for value in head.evaluate(column) if value == value] == timed


def test_on_paper_nothing_is_hidden(opened):
    tab = opened({"width": 1032, "height": 720}, "dark")  # A4 landscape within its margins, at 96 dots per inch
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1032
    hidden = tab.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((node) => {
          const style = getComputedStyle(node);
          return style.display === "none" || style.visibility === "hidden" || style.overflowX === "auto";
        }).filter((node) => !node.closest("defs")).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert hidden == []
    widest = tab.evaluate("Math.max(...[...document.querySelectorAll('table')].map((item) => item.scrollWidth))")
    assert 400 < widest <= 1032
    contrasts = tab.evaluate(CONTRASTS)
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


def test_the_browser_is_looked_for_in_order(tmp_path, monkeypatch):
    named = tmp_path / "mine"
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    monkeypatch.setenv("DYNAMAX_CHROMIUM", str(named))
    assert find_browser() == str(named)
    monkeypatch.delenv("DYNAMAX_CHROMIUM")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() is None
    for name in ("google-chrome", "chromium"):
        shutil.copy(named, tmp_path / name)
        assert Path(find_browser() or "").name == name
    assert os.environ["PATH"] == str(tmp_path)
