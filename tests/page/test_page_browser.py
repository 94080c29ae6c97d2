"""The page as a browser shows it; skipped without Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import made_up
import pytest
from braid_orchestrator.page.windows import count_of
from braid_wire.errors import RequestInvalid
from page_harness import Watched

# Every text on the page against what lies behind it: WCAG 2.2, 1.4.3 and its formula of luminance.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const bytes = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = bytes(color).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (bytes(color)[3] === 255) return color;
    }
    return "white";
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || !box.height || node.closest("noscript, .unseen")) continue;
    const style = getComputedStyle(node);
    if (style.visibility !== "visible") continue;
    const [a, b] = [luminance(style.color), luminance(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, node.textContent.slice(0, 30), node.className]);
  }
  return found;
}"""


FOCUSED = """(() => {
  const node = document.activeElement;
  return node.id || node.dataset.layer || node.className;
})()"""


@contextmanager
def opened(browser: Any, watched: Watched, **options: Any) -> Iterator[Any]:
    """A page without anything in its console at the end."""
    said: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        yield page
    finally:
        context.close()
    assert [text for text in said if "ERR_" not in text] == []


def pretend(page: Any, *events: tuple[str, made_up.Json]) -> None:
    """The page gets these events instead of the cell's; the stream then stays without more."""
    body = made_up.stream(*events)
    page.route("**/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_it_follows_a_real_cell(browser: Any, watched: Watched) -> None:
    with opened(browser, watched) as page:
        page.goto(watched.page.url)
        page.wait_for_selector("#state[data-state=serving]")
        assert page.title() == "tiny · Braid"
        with pytest.raises(RequestInvalid):
            watched.client.complete([1 << 29], 4)
        watched.client.complete("def add(", 32, ignore_eos=True)
        totals = watched.cell.dispatcher.totals
        page.wait_for_function(
            "made => document.querySelector('#tile-tokens .small').textContent.startsWith(made)",
            arg=f"{count_of(watched.cell.metrics.generated_tokens):,.0f} made",
        )
        layers = page.locator(".strip[data-role=target] .layer")
        plan = watched.cell.plans.target
        assert [layers.nth(i).get_attribute("data-kind") for i in range(layers.count())] == [
            spec.kind.value for spec in plan
        ]
        for (role, layer_id, side), counted in totals.items():
            row = page.locator(f"#table tr[data-key='{role.value}/{layer_id}/{side.value}']")
            shown = [int(text.replace(",", "")) for text in row.locator("td").all_inner_texts()[4:8]]
            assert shown == [
                counted.dispatches.get(mode, 0) for mode in ("extend", "decode", "verify", "mixed")
            ]
        first = page.locator("#errors li").first
        assert "REQUEST_INVALID" in first.inner_text() and str(1 << 29) in first.inner_text()
        processes = page.locator("#services tbody").inner_text()
        assert str(os.getpid()) in processes
        assert processes.count("ready") == 2
        assert "kept for later" in page.locator("#pools").inner_text()


def test_kinds_differ_without_colour(browser: Any, watched: Watched) -> None:
    with opened(browser, watched) as page:
        pretend(page, ("cell", made_up.description(12)), ("frame", made_up.frame(12)))
        page.goto(watched.page.url)
        page.wait_for_selector("#table tbody tr")
        for layer_id, kind in enumerate(made_up.kinds_of(12)):
            layer = page.locator(f".layer[data-layer='{layer_id}']")
            assert layer.locator(".above .letter").all_inner_texts() == ["F"] * (kind in ("full", "parallel"))
            assert layer.locator(".below .letter").all_inner_texts() == ["L"] * (
                kind in ("linear", "parallel")
            )
            told = layer.get_attribute("aria-label")
            if kind == "none":
                assert told == f"target layer {layer_id}: no attention"
            else:
                assert f"{30 + layer_id} microseconds" in told
        heights = [
            page.locator(f".layer[data-layer='{i}'] .bar").first.bounding_box()["height"] for i in (0, 11)
        ]
        assert heights[1] > heights[0]
        # What the cell says is text and never becomes a part of the page.
        assert page.locator("#model").inner_text() == "<b>Made-Up</b>-80B"
        assert page.locator("#model b, #requests img").count() == 0


def test_it_says_when_something_is_wrong(browser: Any, watched: Watched) -> None:
    with opened(browser, watched) as page:
        pretend(page, ("cell", made_up.description(8)), ("frame", made_up.frame(8, state="recovering")))
        page.goto(watched.page.url)
        page.wait_for_selector("#table tbody tr")
        linear = page.locator("#services tr[data-key=linear] .state")
        assert (linear.inner_text(), linear.get_attribute("title")) == ("lost", "gone")
        assert page.locator(".meter[data-pressed=true]").count() == 1
        assert "SERVICE_LOST" in page.locator("#errors").inner_text()
        # The made-up stream has ended: the page says so and goes on trying.
        # In one go: each time that it tries, its banner is gone for a moment.
        page.wait_for_function("document.querySelector('#banner').innerText.includes('does not answer')")
        page.unroute("**/events")
        page.wait_for_selector("#state[data-state=serving]")
        page.wait_for_selector("#banner", state="hidden")


def test_the_keyboard_reaches_everything(browser: Any, watched: Watched) -> None:
    with opened(browser, watched) as page:
        pretend(page, ("cell", made_up.description(12)), ("frame", made_up.frame(12)))
        page.goto(watched.page.url)
        page.wait_for_selector("#table tbody tr")
        stops = []
        for _ in range(5):
            page.keyboard.press("Tab")
            stops.append(page.evaluate(FOCUSED))
        assert stops == ["skip", "pause", "theme", "0", "scroll"]
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(FOCUSED) == "10"
        assert page.locator(".layer[aria-pressed=true]").get_attribute("data-layer") == "10"
        assert "layer 10" in page.locator("#detail h3").inner_text()
        page.keyboard.press("Home")
        assert page.evaluate(FOCUSED) == "0"
        page.locator("#pause").focus()
        page.keyboard.press("Enter")
        assert page.locator("#pause").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser: Any, watched: Watched, scheme: str) -> None:
    with opened(browser, watched, color_scheme=scheme, reduced_motion="reduce") as page:
        pretend(page, ("cell", made_up.description(96)), ("frame", made_up.frame(96, state="recovering")))
        page.goto(watched.page.url)
        page.wait_for_selector("#banner:not([hidden])")
        levels = page.evaluate(
            "[...new Set([...document.querySelectorAll('.strip .bar')].map(n => n.dataset.level))]"
        )
        assert len(levels) > 3
        found = page.evaluate(CONTRASTS)
        assert len(found) > 500
        assert [entry for entry in found if entry[0] < 4.5] == []


def test_the_theme_is_chosen_and_kept(browser: Any, watched: Watched) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    with opened(browser, watched, color_scheme="light") as page:
        page.goto(watched.page.url)
        light = page.evaluate(ground)
        for name in ("light", "dark"):
            page.click("#theme")
            assert page.locator("#theme").inner_text() == f"Theme: {name}"
        dark = page.evaluate(ground)
        assert dark != light
        page.reload()
        assert page.evaluate(ground) == dark
        page.click("#theme")
        assert page.evaluate(ground) == light


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_hangs_over_the_side(browser: Any, watched: Watched, width: int) -> None:
    with opened(browser, watched, viewport={"width": width, "height": 800}) as page:
        pretend(page, ("cell", made_up.description(96)), ("frame", made_up.frame(96)))
        page.goto(watched.page.url)
        page.wait_for_selector("#table tbody tr")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('button')].map(n => n.getBoundingClientRect().toJSON())"
        )
        assert min(min(size["width"], size["height"]) for size in sizes) >= 24
