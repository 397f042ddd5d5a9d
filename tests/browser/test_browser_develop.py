"""The Develop page in a real browser, under the policy that it is served with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.client import until
from tests.browser.conftest import Watched, visit
from tests.browser.engine import Served

pytestmark = pytest.mark.browser


def develop(page: Page, prompt: str = "a red apple") -> None:
    page.fill("#prompt", prompt)
    page.click("#develop")


def state(page: Page) -> str | None:
    return page.get_attribute("#easel", "data-state")


def is_drawn(page: Page) -> bool:
    """Whether the frame holds an image that the browser has really decoded."""
    return bool(page.locator("#shown").evaluate("image => image.complete && image.naturalWidth > 0"))


def test_a_picture_develops_in_the_frame_that_it_stays_in(desk: Watched, room: Served) -> None:
    page = desk.page
    room.easel.hold.clear()
    before = page.locator(".tray").bounding_box()
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "running")
    room.easel.step_seconds = 0.02
    room.easel.hold.set()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Developing, step \d+ of 20"))
    until(lambda: is_drawn(page))
    assert page.locator(".tray").bounding_box() == before
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    until(lambda: is_drawn(page))
    assert page.locator(".tray").bounding_box() == before
    assert page.locator("#shown").get_attribute("src", timeout=1000) is not None
    until(lambda: re.fullmatch(r"/pictures/[\w-]+/png", page.get_attribute("#shown", "src") or ""))
    expect(page.locator("#strip a")).to_have_count(1)
    expect(page.locator("#prompt")).to_have_value("a red apple")


def test_control_enter_develops_and_escape_cancels(desk: Watched, room: Served) -> None:
    page = desk.page
    room.easel.hold.clear()
    page.fill("#prompt", "a red apple")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#easel")).to_have_attribute("data-state", re.compile("waiting|running"))
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopping after this step …")
    room.easel.hold.set()
    expect(page.locator("#easel")).to_have_attribute("data-state", "cancelled")
    expect(page.locator("#status")).to_have_text("Cancelled. Nothing of it was kept.")
    expect(page.locator("#prompt")).to_have_value("a red apple")
    expect(page.locator("#strip a")).to_have_count(0)


def test_a_reload_and_a_second_tab_show_the_same_as_the_first(desk: Watched, room: Served) -> None:
    page = desk.page
    room.easel.hold.clear()
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "running")
    page.reload()
    second = desk.context.new_page()
    second.goto(room.url)
    for tab in (page, second):
        expect(tab.locator("#easel")).to_have_attribute("data-state", "running")
        expect(tab.locator("#prompt")).to_have_value("a red apple")
    room.easel.hold.set()
    for tab in (page, second):
        expect(tab.locator("#easel")).to_have_attribute("data-state", "done")
        expect(tab.locator("#strip a")).to_have_count(1)


def test_what_is_half_written_survives_reload_and_the_back_button(desk: Watched, room: Served) -> None:
    page = desk.page
    with page.expect_response("**/api/draft"):
        page.fill("#prompt", "a green fr")
    page.reload()
    expect(page.locator("#prompt")).to_have_value("a green fr")
    with page.expect_response("**/api/draft"):
        page.fill("#prompt", "a green frog")
    expect(page.locator("#notices li")).to_have_count(0)
    page.click("text=Privacy")
    expect(page.locator("h1")).to_have_text("Privacy")
    page.go_back()
    expect(page.locator("#prompt")).to_have_value("a green frog")


def test_an_example_fills_the_prompt_and_is_in_no_address(desk: Watched) -> None:
    page = desk.page
    page.click("text=a blue umbrella on a yellow background")
    expect(page.locator("#prompt")).to_have_value("a blue umbrella on a yellow background")
    expect(page.locator("#prompt")).to_be_focused()
    assert all("umbrella" not in address for address in desk.asked)


def test_enter_in_a_field_develops_and_does_not_take_an_example(desk: Watched) -> None:
    page = desk.page
    page.fill("#prompt", "a green frog")
    page.click("#more summary")
    page.fill("#seed", "7")
    page.press("#seed", "Enter")
    expect(page.locator("#status")).to_have_text("Seed 7")
    expect(page.locator("#prompt")).to_have_value("a green frog")


def test_a_telephone_number_is_noticed_quietly_while_it_is_written(desk: Watched) -> None:
    page = desk.page
    page.fill("#prompt", "a red apple, call 0151 2345678")
    expect(page.locator("#notices li")).to_contain_text("This looks like a telephone number.")
    page.click("#develop")
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    page.fill("#prompt", "the quarterly report")
    expect(page.locator("#notices li")).to_contain_text("This model knows none of these words")


def test_a_refused_field_is_pointed_at_and_the_words_stay(desk: Watched) -> None:
    page = desk.page
    desk.refusals = 1
    page.fill("#prompt", "a red apple")
    page.click("#more summary")
    page.fill("#steps", "0")
    page.click("#more summary")
    page.click("#develop")
    expect(page.locator("#problem")).to_contain_text("Steps must be a whole number from 1 to 150.")
    expect(page.locator("#steps")).to_be_focused()
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#prompt")).to_have_value("a red apple")
    page.fill("#steps", "3")
    expect(page.locator("#problem")).to_be_hidden()


def test_an_engine_error_is_said_in_the_frame(desk: Watched) -> None:
    develop(desk.page, "fail please, an apple")
    expect(desk.page.locator("#what")).to_have_text("The engine ran out of memory.")
    expect(desk.page.locator("#what")).to_be_visible()
    expect(desk.page.locator("#next")).to_contain_text("Try a smaller picture, or fewer at once.")
    expect(desk.page.locator("#prompt")).to_have_value("fail please, an apple")


def test_a_dead_engine_is_said_and_the_next_picture_waits_for_the_new_one(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page, "die please, apple")
    expect(page.locator("#what")).to_have_text("The engine stopped while it was developing this picture.")
    develop(page, "a green frog")
    expect(page.locator("#status")).to_contain_text("The engine is being started again.")
    room.easel.start()
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")


def test_a_full_queue_is_said_and_the_words_stay(desk: Watched, room: Served) -> None:
    page = desk.page
    room.easel.hold.clear()
    desk.refusals = 1
    develop(page)
    for more in range(1, 5):
        page.click("#develop")
        expect(page.locator("#status")).to_contain_text(f"then {more} more of yours", timeout=10_000)
    page.click("#develop")
    expect(page.locator("#problem")).to_contain_text("All 4 places in the queue are taken.")
    expect(page.locator("#prompt")).to_have_value("a red apple")
    room.easel.hold.set()
    expect(page.locator("#strip a")).to_have_count(5)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")


def test_a_session_that_ended_meanwhile_costs_no_words_and_one_more_press(desk: Watched) -> None:
    page = desk.page
    desk.refusals = 1
    page.fill("#prompt", "a green frog")
    expect(page.locator("#notices li")).to_have_count(0)
    page.wait_for_timeout(600)      # the draft is kept by now, so that Develop is the first to notice
    desk.context.clear_cookies()
    page.click("#develop")
    expect(page.locator("#problem")).to_contain_text("has ended")
    expect(page.locator("#prompt")).to_have_value("a green frog")
    page.click("#develop")
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")


def test_a_closed_appliance_is_said_and_the_words_stay(chromium: Browser, room: Served) -> None:
    with visit(chromium) as watched:
        page = watched.page
        page.goto(room.url)
        page.fill("#prompt", "a green frog")
        watched.context.set_offline(True)
        page.click("#develop")
        expect(page.locator("#problem")).to_contain_text("Darkroom does not answer.")
        expect(page.locator("#prompt")).to_have_value("a green frog")


def test_beyond_the_streams_the_page_asks_at_intervals(desk: Watched, room: Served) -> None:
    page = desk.page
    desk.refusals = 1
    page.route("**/events", lambda route: route.fulfill(status=503, body="{}"))
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    assert any(re.search(r"/api/jobs/[\w-]+$", address) for address in desk.asked)


def test_a_picture_is_saved_under_its_seed(desk: Watched, room: Served, tmp_path: Path) -> None:
    page = desk.page
    page.click("#more summary")
    page.fill("#seed", "7")
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    with page.expect_download() as saved:
        page.click("#save")
    assert saved.value.suggested_filename == "darkroom-7.png"
    saved.value.save_as(tmp_path / "saved.png")
    with Image.open(tmp_path / "saved.png") as picture:
        assert picture.size == (192, 192)


def test_a_seed_is_kept_for_the_next_picture_and_again_takes_a_new_one(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    seed = page.get_attribute("#strip a", "data-seed")
    page.click("#keep-seed")
    expect(page.locator("#seed")).to_have_value(seed or "")
    page.click("#develop")
    expect(page.locator("#strip a")).to_have_count(2)
    page.click("#again button")
    expect(page.locator("#strip a")).to_have_count(3)
    seeds = page.locator("#strip a").evaluate_all("links => links.map(link => link.dataset.seed)")
    assert seeds[1] == seeds[2] == seed != seeds[0]


def test_forgetting_a_picture_takes_it_off_the_page_and_out_of_the_vault(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    expect(page.locator("#strip a")).to_have_count(1)
    page.click("#forget-one button")
    expect(page.locator("#strip a")).to_have_count(0)
    expect(page.locator("#shown")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("Forgotten. Nothing of that picture is kept.")
    assert room.vault.held == 0


def test_another_picture_can_be_looked_at_while_one_develops(desk: Watched, room: Served) -> None:
    page = desk.page
    develop(page)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")
    room.easel.hold.clear()
    page.click("#develop")
    expect(page.locator("#easel")).to_have_attribute("data-state", "running")
    page.click("#strip a")
    expect(page.locator("#shown")).to_have_attribute("src", re.compile("/pictures/"))
    expect(page.locator("#status")).to_contain_text("Developing")
    room.easel.hold.set()
    expect(page.locator("#strip a")).to_have_count(2)
    expect(page.locator("#easel")).to_have_attribute("data-state", "done")


def test_the_title_tells_how_far_it_is(desk: Watched, room: Served) -> None:
    room.easel.hold.clear()
    develop(desk.page)
    expect(desk.page).to_have_title(re.compile(r"^\d+ % · Darkroom$|^Waiting · Darkroom$"))
    room.easel.hold.set()
    expect(desk.page).to_have_title("Darkroom")
