"""The whole appliance as a newcomer has it: its own command, the built-in model, and Chromium under the policy it serves."""

from __future__ import annotations

import re

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from tests.browser.conftest import visit
from tests.conftest import Appliance

pytestmark = pytest.mark.browser


def test_a_newcomer_takes_an_example_and_gets_a_picture_that_can_be_saved(chromium: Browser, served: Appliance) -> None:
    with visit(chromium) as watched:
        page = watched.page
        page.set_default_timeout(120_000)
        page.goto(served.url)
        page.get_by_role("button", name="a red apple", exact=True).click()
        expect(page.locator("#prompt")).to_have_value("a red apple")
        page.click("#develop")
        expect(page.locator("#easel")).to_have_attribute("data-state", "done", timeout=120_000)
        with page.expect_download() as saved:
            page.get_by_role("link", name="Save").click()
        assert re.fullmatch(r"darkroom-\d+\.png", saved.value.suggested_filename)
        with Image.open(saved.value.path()) as picture:
            assert picture.size == (192, 192)
            assert picture.info == {} or set(picture.info) <= {"srgb"}
            # An apple on white: something red in the middle, and a light corner.
            red, green, blue = picture.convert("RGB").resize((3, 3)).getpixel((1, 1))     # type: ignore[misc]
            assert red > green + 30
            assert red > blue + 30
        watched.assert_clean(served.url)


def test_without_javascript_the_form_gives_a_picture_too(chromium: Browser, served: Appliance) -> None:
    with visit(chromium, script=False, width=390, height=844) as watched:
        page = watched.page
        page.set_default_timeout(120_000)
        page.goto(served.url)
        page.fill("#prompt", "a castle")
        page.click("#develop")
        expect(page.locator("#easel")).to_have_attribute("data-state", "done", timeout=120_000)
        assert page.locator("#shown").evaluate("image => image.naturalWidth") == 192
        watched.assert_clean(served.url)
