"""The face of the seal in a real browser: seen at every width, by day and by night, without a script and by keyboard."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from appliance.seal.control import ask, the_only
from appliance.seal.posture import Posture
from tests.browser.conftest import visit
from tests.browser.engine import Served
from tests.conftest import Appliance
from tests.postures import HELD, OPEN, WALLS_MISSING, told

pytestmark = pytest.mark.browser

WINDOWS = [(1280, 860, False), (390, 844, True), (320, 640, True)]
CROWDED = (
    "() => [...document.querySelectorAll('main *, .top > *, .banner *')].filter(e => e.checkVisibility() && !e.matches('.unseen'))"
    ".map(e => [e.outerHTML.slice(0, 60), e.getBoundingClientRect()])"
    ".filter(([, r]) => r.left < 0 || r.right > innerWidth + 0.5).map(([name]) => name)"
)


def is_visible_at_the_top(page: Page) -> bool:
    """Say whether the state of the seal stands within the first screen, beside the name and in one line with it."""
    brand, state = (page.locator(name).bounding_box() for name in (".brand", ".state"))
    assert brand is not None
    assert state is not None
    return abs((brand["y"] + brand["height"] / 2) - (state["y"] + state["height"] / 2)) < 4 and state["y"] < 200


@pytest.mark.parametrize("dark", [True, False], ids=["night", "day"])
@pytest.mark.parametrize(("width", "height", "touch"), WINDOWS)
def test_what_was_seen_can_be_read_in_every_window(
    chromium: Browser, room: Served, width: int, height: int, touch: bool, dark: bool
) -> None:
    with visit(chromium, width=width, height=height, touch=touch, dark=dark) as watched:
        page = watched.page
        for posture, title in (
            (None, "Nothing has been observed yet"), (HELD, "Sealed"), (WALLS_MISSING, "Sealed"), (OPEN, "NOT sealed"),
            (Posture.unknown(), "NOT sealed"),
        ):
            if posture is not None:
                room.seal.show(told(posture))
            page.goto(room.url)
            page.click(".state")
            expect(page).to_have_url(f"{room.url}/status")
            expect(page.locator("h1")).to_have_text(title)
            assert is_visible_at_the_top(page)
            assert page.locator(".promises li").count() == (0 if posture is None else len(posture.promises()))
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            assert page.evaluate(CROWDED) == []
            forget, state = page.locator("#forget").bounding_box(), page.locator(".state").bounding_box()
            assert forget is not None
            assert state is not None
            assert forget["x"] >= state["x"] + state["width"]
        watched.assert_clean(room.url)


@pytest.mark.parametrize("dark", [True, False], ids=["night", "day"])
def test_the_banner_stands_above_everything_and_in_colours_that_can_be_read(chromium: Browser, room: Served, dark: bool) -> None:
    room.seal.show(told(OPEN))
    with visit(chromium, dark=dark) as watched:
        page = watched.page
        watched.refusals = 1
        for path in ("/", "/privacy", "/status", "/nothing"):
            page.goto(f"{room.url}{path}")
            box = page.locator(".banner").bounding_box()
            assert box is not None
            assert (box["x"], box["y"], box["width"]) == (0, 0, 1280)
        ink, ground = (page.locator(".banner").evaluate(f"e => getComputedStyle(e).{name}") for name in ("color", "backgroundColor"))
        assert contrast(ink, ground) >= 4.5
        page.click(".banner a")
        expect(page).to_have_url(f"{room.url}/status")
        watched.assert_clean(room.url)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as a browser writes them (WCAG 2.2)."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_with_the_banner_the_picture_and_develop_still_fit_the_first_screen(chromium: Browser, room: Served) -> None:
    with visit(chromium, height=800) as watched:
        page = watched.page
        heights = []
        for posture in (HELD, OPEN):
            room.seal.show(told(posture))
            page.goto(room.url)
            tray, button = page.locator(".tray").bounding_box(), page.locator("#develop").bounding_box()
            assert tray is not None
            assert button is not None
            heights.append(tray["y"] + tray["height"])
            assert button["y"] + button["height"] <= 800
        assert heights[1] - heights[0] < 4
        watched.assert_clean(room.url)


def test_whether_it_holds_is_told_by_a_sign_and_a_word_and_not_by_colour_alone(chromium: Browser, room: Served) -> None:
    room.seal.show(told(OPEN))
    with visit(chromium) as watched:
        page = watched.page
        page.goto(f"{room.url}/status")
        found = {
            page.locator(f".promises [data-state={kind}] .verdict").first.inner_text().replace("\n", " ")
            for kind in ("holds", "broken")
        }
        assert {re.sub(r"\s+", "", words) for words in found} == {"✓Holds", "✕Broken"}
        filled = {}
        for posture in (HELD, OPEN):
            room.seal.show(told(posture))
            page.reload()
            filled[posture.sealed] = page.locator(".state .mark").evaluate("e => getComputedStyle(e).backgroundColor")
        assert filled[False] == "rgba(0, 0, 0, 0)"
        assert filled[True] != filled[False]
        watched.assert_clean(room.url)


def test_what_is_broken_is_one_press_away_from_its_line(chromium: Browser, room: Served) -> None:
    room.seal.show(told(OPEN))
    with visit(chromium, script=False, width=390, height=844, touch=True) as watched:
        page = watched.page
        page.goto(f"{room.url}/status")
        page.click(".found a >> nth=1")
        line = page.locator("[id='1.filter']")
        expect(line).to_be_in_viewport()
        expect(line).to_contain_text("of 7 threads 0 are filtered")
        watched.assert_clean(room.url)


def test_the_running_appliance_shows_the_promises_that_it_tells_over_its_control_socket(
    chromium: Browser, served: Appliance
) -> None:
    said = ask(the_only(served.folder / "darkroom"), "status")
    promises = said["promises"]
    assert isinstance(promises, list)
    with visit(chromium) as watched:
        page = watched.page
        page.goto(f"{served.url.rstrip('/')}/status")
        expect(page.locator("h1")).to_have_text("Sealed" if said["sealed"] else "NOT sealed")
        ids = page.locator(".promises li").evaluate_all("lines => lines.map(line => line.id)")
        held = page.locator(".promises [data-state=holds]").evaluate_all("lines => lines.map(line => line.id)")
        assert ids == [promise["id"] for promise in promises]
        assert held == [promise["id"] for promise in promises if promise["holds"]]
        watched.assert_clean(served.url)
