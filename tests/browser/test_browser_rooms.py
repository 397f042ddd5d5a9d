"""The pages as a whole in a real browser: policy, leaving, no script, narrow and wide, day and night."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Watched, visit
from tests.browser.engine import Served
from tests.conftest import Appliance

pytestmark = pytest.mark.browser

PAGES = ("/", "/pictures", "/model", "/privacy", "/status", "/forgotten")


def develop(page: Page) -> None:
    page.fill("#prompt", "a red apple")
    page.click("#develop")
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")


# ── The policy ────────────────────────────────────────────────────────────────


def test_the_policy_holds_what_it_says(desk: Watched) -> None:
    """The positive control: a script that breaks the policy is stopped, and the watch notices it."""
    page = desk.page
    page.evaluate("() => { document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x.png' })) }")
    until_said(desk, "Content Security Policy")
    with pytest.raises(Exception, match="Trusted|blocked|requires"):
        page.evaluate("() => { document.body.innerHTML = '<b>x</b>' }")
    assert [address for address in desk.asked if ":9/" in address] == [] or desk.said
    desk.said.clear()
    desk.asked[:] = [address for address in desk.asked if ":9/" not in address]


def until_said(watched: Watched, words: str) -> None:
    for _ in range(100):
        if any(words in line for line in watched.said):
            return
        watched.page.wait_for_timeout(50)
    raise AssertionError(f"nothing of {words!r} was said")


def test_nothing_is_stored_in_the_browser_but_the_cookie(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    stored = page.evaluate(
        "async () => [localStorage.length, sessionStorage.length, (await indexedDB.databases()).length,"
        " (await caches.keys()).length, document.cookie, JSON.stringify(history.state)]"
    )
    assert stored == [0, 0, 0, 0, "", "null"]
    assert [cookie["name"] for cookie in desk.context.cookies()] == [f"darkroom-{room.url.rpartition(':')[2]}"]
    assert page.url.removeprefix(room.url) == "/"


# ── Leaving ───────────────────────────────────────────────────────────────────


def test_forgetting_everything_asks_once_and_the_back_button_shows_nothing(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    expect(page.locator("#shown")).to_have_attribute("src", re.compile(r"/pictures/[\w-]+/png"))
    picture = page.get_attribute("#shown", "src")
    page.click("#forget summary")
    page.keyboard.press("Escape")
    expect(page.locator(".ask")).to_be_hidden()
    expect(page.locator("#forget summary")).to_be_focused()
    page.click("#forget summary")
    page.click("text=Yes, forget everything")
    expect(page.locator("h1")).to_have_text("Forgotten")
    page.go_back()
    expect(page.locator("#prompt")).to_have_value("")
    expect(page.locator("#strip a")).to_have_count(0)
    desk.refusals = 1
    assert page.goto(f"{room.url}{picture}").status == 404     # type: ignore[union-attr]
    assert room.vault.held == 0


def test_a_tab_that_was_left_open_learns_that_its_session_has_ended(desk: Watched, room: Served) -> None:
    page = desk.page
    room.easel.hold.clear()
    # What was written is kept 400 ms after the last key. A draft that came after the session's end would be refused with 403,
    # rightly and without a word on the page; here it has been kept before, so that nothing at all may be refused.
    with page.expect_response("**/api/draft") as kept:
        page.fill("#prompt", "a red apple")
        page.click("#develop")
    assert kept.value.status == 200
    expect(page.locator("#easel")).to_have_attribute("data-state", "running")
    other = desk.context.new_page()
    other.goto(f"{room.url}/privacy")
    other.click("#forget summary")
    other.click("text=Yes, forget everything")
    expect(other.locator("h1")).to_have_text("Forgotten")
    expect(page.locator("#status")).to_have_text("The session has ended, and its pictures are gone.")
    room.easel.hold.set()


def test_a_link_from_another_site_finds_the_session_again(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    page.route("http://elsewhere.example/", lambda route: route.fulfill(
        content_type="text/html", body=f'<a href="{room.url}/">in</a>'
    ))
    page.goto("http://elsewhere.example/")
    page.click("text=in")
    expect(page.locator("#strip a")).to_have_count(1)
    desk.asked[:] = [address for address in desk.asked if "elsewhere.example" not in address]


# ── No script ─────────────────────────────────────────────────────────────────


def test_everything_works_without_a_script(chromium: Browser, room: Served) -> None:
    with visit(chromium, script=False) as watched:
        page = watched.page
        page.goto(room.url)
        page.click("text=a green frog")
        expect(page.locator("#prompt")).to_have_value("a green frog")
        room.easel.hold.clear()
        page.click("#develop")
        expect(page).to_have_url(re.compile("/jobs/"))
        expect(page.locator("#status")).to_contain_text("Developing")
        page.click("#cancel button")
        room.easel.hold.set()
        expect(page.locator("#easel")).to_have_attribute("data-state", "cancelled")
        page.fill("#prompt", "a red apple")
        room.easel.step_seconds = 0.1
        page.click("#develop")
        expect(page.locator("#easel")).to_have_attribute("data-state", "done")       # by the page's own refresh
        room.easel.step_seconds = 0
        page.click("text=Keep this seed")
        assert page.input_value("#seed") != ""
        page.fill("#steps", "0")
        watched.refusals = 1
        page.click("#develop")
        expect(page.locator("#problem")).to_contain_text("Steps must be a whole number")
        expect(page.locator("#prompt")).to_have_value("a red apple")
        page.click("#strip a")
        page.click("text=Forget this picture")
        expect(page.locator("#strip a")).to_have_count(0)
        page.click("#forget summary")
        page.click("text=Yes, forget everything")
        expect(page.locator("h1")).to_have_text("Forgotten")
        watched.assert_clean(room.url)


# ── Narrow and wide, day and night ────────────────────────────────────────────


@pytest.mark.parametrize("dark", [True, False], ids=["night", "day"])
@pytest.mark.parametrize(("width", "height", "touch"), [(1280, 860, False), (390, 844, True), (320, 640, True)])
def test_no_page_is_wider_than_its_window(
    chromium: Browser, room: Served, width: int, height: int, touch: bool, dark: bool
) -> None:
    with visit(chromium, width=width, height=height, touch=touch, dark=dark) as watched:
        page = watched.page
        page.goto(room.url)
        develop(page)
        page.click("#more summary")
        for path in PAGES:
            if path != "/":
                page.goto(f"{room.url}{path}")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width, path
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(18, 16, 15)" if dark else "rgb(246, 243, 238)")
        watched.assert_clean(room.url)


def test_on_a_phone_the_picture_comes_first_and_develop_stays_at_the_edge(chromium: Browser, room: Served) -> None:
    with visit(chromium, width=390, height=844, touch=True) as watched:
        page = watched.page
        page.goto(room.url)
        for _ in range(2):
            tray, prompt, button = (page.locator(name).bounding_box() for name in (".tray", "#prompt", "#develop"))
            assert tray is not None
            assert prompt is not None
            assert button is not None
            assert tray["y"] < prompt["y"]
            assert 844 - 24 <= button["y"] + button["height"] <= 844
            page.mouse.wheel(0, 300)
        watched.assert_clean(room.url)


@pytest.mark.parametrize("width", [1280, 390])
def test_whatever_can_be_pressed_is_large_enough_for_a_thumb(chromium: Browser, room: Served, width: int) -> None:
    with visit(chromium, width=width, touch=width < 800) as watched:
        page = watched.page
        page.goto(room.url)
        develop(page)
        page.click("#more summary")
        small = page.evaluate(
            "() => [...document.querySelectorAll('a, button, summary, input:not([type=hidden]), select, textarea, .choice label')]"
            ".filter(e => e.checkVisibility() && !e.matches('.unseen, .skip, .state, .choice input'))"
            ".map(e => [e.outerHTML.slice(0, 60), e.getBoundingClientRect().height]).filter(([, h]) => h < 44)"
        )
        assert small == []


def test_everything_that_can_be_filled_in_has_a_name_and_is_left_alone_by_the_browser(desk: Watched) -> None:
    page = desk.page
    unnamed = page.locator("input:not([type=hidden]), select, textarea").evaluate_all(
        "fields => fields.filter(f => !f.labels.length).map(f => f.name)"
    )
    assert unnamed == []
    for name in ("#prompt", "#negative_prompt"):
        for attribute, value in (
            ("autocomplete", "off"), ("spellcheck", "false"), ("translate", "no"), ("autocapitalize", "off")
        ):
            assert page.get_attribute(name, attribute) == value


def test_the_page_can_be_used_by_keyboard_in_the_order_that_it_is_read(desk: Watched) -> None:
    page = desk.page
    # The prompt has the focus from the start; whoever goes back to the top finds the way from there.
    page.focus(".skip")
    reached = [page.evaluate("() => document.activeElement.textContent.trim()")]
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))
    wanted = ["Skip to the page", "Darkroom", "Develop", "Contact sheet", "Model", "Privacy", "prompt", "develop"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted


# ── With the real engine ──────────────────────────────────────────────────────


def test_the_built_in_model_draws_what_was_written(chromium: Browser, served: Appliance) -> None:
    with visit(chromium) as watched:
        page = watched.page
        page.goto(served.url)
        page.fill("#prompt", "a red apple")
        page.click("#develop")
        page.wait_for_selector("#easel[data-state=done]", timeout=120_000)
        expect(page.locator("#strip a")).to_have_count(1)
        watched.assert_clean(served.url)
