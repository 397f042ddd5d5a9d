"""The face of the seal: the Status page, the top of every page, the banner, and what the privacy page says of it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from appliance.seal.posture import Posture
from appliance.web.room import Seen
from appliance.web.status import View, ago
from tests.browser.client import Pages, Visitor, pages
from tests.postures import HELD, OPEN, WALLS_MISSING, told

BANNER = "What you write here could leave this machine."
EVERY_PAGE = ("/", "/pictures", "/model", "/privacy", "/status", "/forgotten", "/nothing", "/pictures/x")


@pytest.fixture
def here() -> Iterator[Pages]:
    made = pages()
    yield made
    made.easel.hold.set()
    made.easel.die()


def text(visitor: Visitor, path: str, **headers: str) -> str:
    """Return what a reader of the page reads, in one line."""
    page = visitor.get(path, **headers).get_data(as_text=True)
    body = re.sub(r"<[^>]*>", " ", page.partition("<body")[2])
    return re.sub(r"\s+", " ", html.unescape(body))


def state(visitor: Visitor, path: str = "/") -> str:
    """Return what the top of a page says of the seal."""
    page = visitor.get(path).get_data(as_text=True)
    found = re.search(r'<a class="state" href="/status" data-seal="(\w+)".*?</span><span>([^<]+)', page)
    assert found is not None
    return f"{found[1]}: {found[2]}"


def verdicts(page: str) -> dict[str, str]:
    """Return the word that stands beside each promise, by its id."""
    found = re.findall(r'<li id="([\w.]+)" data-state="(\w+)">.*?</span>(\w+)</p>', page, re.DOTALL)
    assert all({"holds": "Holds", "broken": "Broken", "missing": "Missing"}[kind] == word for _, kind, word in found)
    return {id_: word for id_, _, word in found}


# ── Before anything was seen ──────────────────────────────────────────────────


def test_before_the_first_look_no_page_claims_anything(here: Pages) -> None:
    visitor = here.visitor()
    assert state(visitor) == "looking: Looking …"
    said = text(visitor, "/status")
    assert "Nothing has been observed yet" in said
    for path in EVERY_PAGE:
        page = text(visitor, path)
        assert "Sealed ·" not in page
        assert BANNER not in page
    assert "Every way out of this machine was tried" not in text(visitor, "/privacy")
    assert "Nothing has been observed yet." in text(visitor, "/privacy")


# ── Everything holds ──────────────────────────────────────────────────────────


def test_the_status_page_says_first_that_it_is_sealed_and_when_that_was_seen(here: Pages) -> None:
    here.seal.show(told(HELD))
    page = here.visitor().get("/status").get_data(as_text=True)
    assert re.search(r"<main[^>]*>\s*<h1>Sealed</h1>", page)
    assert re.search(r'Looked at (just now|\d+ seconds? ago) \(<time datetime="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ">', page)
    assert "14 of 14 promises hold" in page


def test_every_promise_stands_on_the_page_with_its_id_its_title_and_what_was_observed(here: Pages) -> None:
    visitor = here.visitor()
    for posture in (HELD, WALLS_MISSING, OPEN, Posture.unknown()):
        here.seal.show(told(posture))
        page = html.unescape(visitor.get("/status").get_data(as_text=True))
        assert list(verdicts(page)) == [promise.id for promise in posture.promises()]
        for promise in posture.promises():
            assert f"<code>{promise.id}</code>" in page
            assert f"<h3>{promise.title}</h3>" in page
            assert promise.observed in page


def test_promises_stand_under_what_they_are_about(here: Pages) -> None:
    here.seal.show(told(HELD))
    sections = re.findall(r"<section.*?</section>", here.visitor().get("/status").get_data(as_text=True), re.DOTALL)
    numbers = [{id_.partition(".")[0] for id_ in verdicts(section)} for section in sections]
    assert numbers == [{"1"}, {"2"}, {"3"}, {"4"}]


def test_a_sealed_room_has_no_banner_and_says_so_at_the_top_of_every_page(here: Pages) -> None:
    here.seal.show(told(HELD))
    visitor = here.visitor()
    for path in EVERY_PAGE:
        assert state(visitor, path) == "sealed: Sealed"
        assert BANNER not in text(visitor, path)


# ── Walls that are missing ────────────────────────────────────────────────────


def test_a_wall_that_the_machine_does_not_offer_is_missing_with_its_reason_and_no_alarm(here: Pages) -> None:
    here.seal.show(told(WALLS_MISSING))
    visitor = here.visitor()
    page = visitor.get("/status").get_data(as_text=True)
    assert {id_ for id_, word in verdicts(page).items() if word == "Missing"} == {"1.network", "3.files", "3.swap"}
    assert "Broken" not in verdicts(page).values()
    assert "user namespaces are limited to none" in page
    assert "<h1>Sealed</h1>" in page
    assert "3 protections are missing on this machine. That opens no way out" in page
    assert state(visitor) == "sealed: Sealed"
    assert BANNER not in text(visitor, "/")


def test_the_privacy_page_says_of_swap_what_was_observed(here: Pages) -> None:
    visitor = here.visitor()
    assert "If this machine swaps memory to an unencrypted disk" in text(visitor, "/privacy")
    here.seal.show(told(HELD))
    assert "Nor does memory that holds it reach a disk in the clear." in text(visitor, "/privacy")
    assert "worker and engine: memory is locked" in text(visitor, "/privacy")
    here.seal.show(told(WALLS_MISSING))
    said = text(visitor, "/privacy")
    assert "Nor does memory" not in said
    assert "Parts of memory may end up on this machine’s disk." in said
    assert "/dev/vda2 is swap in the clear" in said


# ── A way out is open ─────────────────────────────────────────────────────────


def test_an_open_way_out_is_said_on_every_page_and_cannot_be_sent_away(here: Pages) -> None:
    here.seal.show(told(OPEN))
    visitor = here.visitor()
    for path in EVERY_PAGE:
        page = visitor.get(path).get_data(as_text=True)
        assert BANNER in page, path
        assert "NOT sealed" in state(visitor, path)
        banner = page.partition('<aside class="banner"')[2].partition("</aside>")[0]
        assert not re.search(r"<(button|details|form|input)", banner)


def test_refusals_and_the_step_inside_carry_the_banner_too(here: Pages) -> None:
    here.seal.show(told(OPEN))
    visitor = here.visitor()
    step = visitor.get("/", Sec_Fetch_Site="cross-site").get_data(as_text=True)
    assert 'http-equiv="refresh"' in step
    assert BANNER in step
    visitor.get("/")
    for answer in (
        visitor.post("/jobs", {"prompt": "a red apple", "steps": "0"}),
        visitor.post("/jobs", {"csrf": "wrong", "prompt": "a red apple"}),
        visitor.post("/status"),
        visitor.post("/jobs", Origin="https://evil.example"),
    ):
        assert answer.status_code >= 400
        assert BANNER in answer.get_data(as_text=True)


def test_what_went_wrong_inside_carries_the_banner_too(here: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    here.seal.show(told(OPEN))
    monkeypatch.setattr(here.vault, "images", lambda _: 1 / 0)
    answer = here.visitor().get("/pictures")
    assert answer.status_code == 500
    assert BANNER in answer.get_data(as_text=True)


def test_the_status_page_of_an_open_room_begins_with_what_is_broken(here: Pages) -> None:
    here.seal.show(told(OPEN))
    page = here.visitor().get("/status").get_data(as_text=True)
    assert re.search(r"<main[^>]*>\s*<h1>NOT sealed</h1>", page)
    assert {id_ for id_, word in verdicts(page).items() if word == "Broken"} == {"1.sockets", "1.filter"}
    found = page.partition('<div class="problem found">')[2].partition("</div>")[0]
    assert re.findall(r'href="#([\w.]+)"', found) == ["1.sockets", "1.filter"]
    assert page.index('<div class="problem found">') < page.index("<section")


def test_the_privacy_page_does_not_promise_what_is_broken(here: Pages) -> None:
    here.seal.show(told(OPEN))
    said = text(here.visitor(), "/privacy")
    assert "But Darkroom is NOT sealed ." in said
    assert "stay in this machine" not in said
    assert "Every way out of this machine was tried" not in said


@pytest.mark.parametrize("silent", ["supervisor", "worker", "engine"])
def test_a_process_that_does_not_answer_is_an_open_way_out(here: Pages, silent: str) -> None:
    here.seal.show(told(replace(HELD, found={role: found for role, found in HELD.found.items() if role != silent})))
    assert state(here.visitor()) == "open: NOT sealed"
    assert f"{silent}: did not answer" in text(here.visitor(), "/status")


def test_when_what_was_seen_changes_the_next_page_says_so(here: Pages) -> None:
    visitor = here.visitor()
    told_so = []
    for posture in (HELD, OPEN, HELD):
        here.seal.show(told(posture))
        told_so.append((state(visitor), BANNER in text(visitor, "/")))
    assert told_so == [("sealed: Sealed", False), ("open: NOT sealed", True), ("sealed: Sealed", False)]


# ── Whose page it is ──────────────────────────────────────────────────────────


def test_the_status_page_begins_no_session_and_holds_nothing_of_one(here: Pages) -> None:
    here.seal.show(told(HELD))
    stranger = here.visitor()
    answer = stranger.get("/status")
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers
    assert 'name="csrf"' not in answer.get_data(as_text=True)
    owner = here.visitor()
    owner.picture("a canary in the darkroom")
    page = owner.get("/status").get_data(as_text=True)
    assert "canary" not in page
    assert "<summary>Forget" in page        # who has a session can end it from here as from everywhere


# ── Alone ─────────────────────────────────────────────────────────────────────


def test_a_promise_of_which_nobody_says_whether_the_seal_rests_on_it_is_taken_for_one_on_which_it_does() -> None:
    said = {"id": "9.new", "title": "Something new", "holds": False, "observed": "engine: seen"}
    seen = View(Seen(sealed=False, promises=(said, {**said, "essential": False}), at=0.0), now=0.0)
    assert [line.state for line in seen.lines] == ["broken", "missing"]


def test_a_promise_of_an_unknown_kind_is_left_out_of_no_group() -> None:
    said = {"id": "9.new", "title": "Something new", "holds": True, "observed": "engine: seen", "essential": False}
    groups = View(Seen(sealed=True, promises=(*told_promises(), said), at=0.0), now=0.0).groups
    assert [line.id for group in groups for line in group.lines] == [*(promise.id for promise in HELD.promises()), "9.new"]


def told_promises() -> tuple[dict[str, object], ...]:
    return tuple(promise.as_json() for promise in HELD.promises())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-30, "just now"), (0, "just now"), (1.9, "just now"), (2, "2 seconds ago"), (59.9, "59 seconds ago"), (60, "1 minute ago"),
     (150, "2 minutes ago"), (3600, "1 hour ago"), (90_000, "25 hours ago")],
)
def test_how_long_ago_it_was_is_said_as_a_person_would(seconds: float, said: str) -> None:
    assert ago(seconds) == said
