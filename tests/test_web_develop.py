"""Making pictures through the pages: what begins a job, what begins none, and what a refusal looks like."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from werkzeug.test import TestResponse

from appliance.trust.description import Sizes
from tests.browser.client import Pages, Visitor, pages, until
from tests.browser.engine import MODEL, ONE_SIZE

CANARY = "canary-7f3a-zebra"


@pytest.fixture
def here() -> Iterator[Pages]:
    made = pages()
    yield made
    made.easel.hold.set()
    made.easel.die()


@pytest.fixture
def visitor(here: Pages) -> Visitor:
    return here.visitor()


def job_of(visitor: Visitor, job: str) -> dict[str, Any]:
    found = visitor.ask(f"/api/jobs/{job}").json
    assert isinstance(found, dict)
    return found


def ended(visitor: Visitor, job: str) -> dict[str, Any]:
    until(lambda: job_of(visitor, job)["state"] not in ("waiting", "running"))
    return job_of(visitor, job)


# ── It works ──────────────────────────────────────────────────────────────────


def test_a_form_becomes_a_picture_without_a_script(visitor: Visitor, here: Pages) -> None:
    here.easel.hold.clear()
    job = visitor.develop("a red apple", seed="7")
    page = visitor.get(f"/jobs/{job}").get_data(as_text=True)
    assert f'<meta http-equiv="refresh" content="2; url=/jobs/{job}">' in page.partition("<noscript>")[2].partition("</noscript>")[0]
    here.easel.hold.set()
    done = ended(visitor, job)
    assert [picture["seed"] for picture in done["pictures"]] == ["7"]
    page = visitor.get(f"/jobs/{job}").get_data(as_text=True)
    assert 'http-equiv="refresh"' not in page
    assert f'src="/pictures/{done["pictures"][0]["id"]}/png"' in page
    assert 'download="darkroom-7.png"' in page


def test_words_become_numbers_and_numbers_are_taken_before_words(visitor: Visitor, here: Pages) -> None:
    for form, (steps, width, height) in (
        ({}, (20, 192, 192)),
        ({"care": "draft"}, (10, 192, 192)),
        ({"care": "fine", "shape": "tall"}, (40, 152, 232)),
        ({"care": "fine", "steps": "3", "shape": "wide", "width": "128", "height": "144"}, (3, 128, 144)),
    ):
        visitor.develop("a red apple", **form)
        request = list(here.jobs._jobs.values())[-1].request
        assert (request.steps, request.width, request.height) == (steps, width, height)
        until(lambda: all(job.ended for job in here.jobs._jobs.values()))


def test_again_asks_for_the_same_with_a_new_seed(visitor: Visitor, here: Pages) -> None:
    picture = visitor.picture("a green frog", seed="7", care="draft", negative_prompt="blue", guidance_scale="3.5", width="128")
    until(lambda: all(job.ended for job in here.jobs._jobs.values()))
    assert visitor.post(f"/pictures/{picture}/again").status_code == 303
    first, second = (job.request for job in here.jobs._jobs.values())
    assert replace(second, seed=7) == first
    assert second.seed != 7


def test_a_kept_seed_stands_in_the_form(visitor: Visitor) -> None:
    picture = visitor.picture("a green frog", seed="123456789")
    assert 'name="seed" inputmode="numeric" autocomplete="off" value=""' in visitor.get(f"/pictures/{picture}").get_data(as_text=True)
    assert 'value="123456789"' in visitor.get(f"/pictures/{picture}/seed").get_data(as_text=True)


def test_an_example_fills_the_form_by_its_number_and_keeps_the_rest(visitor: Visitor, here: Pages) -> None:
    page = visitor.post("/examples", {"example": "1", "prompt": "", "care": "fine", "seed": "5"}).get_data(as_text=True)
    assert "a blue umbrella on a yellow background</textarea>" in page
    assert 'value="fine" checked' in page
    assert 'value="5"' in page
    assert here.jobs._jobs == {}
    for wrong in ("7", "-1", "x", "²", "9" * 30):
        assert visitor.post("/examples", {"example": wrong}).status_code == 400


def test_what_is_being_written_survives_a_reload_and_a_second_tab(visitor: Visitor) -> None:
    visitor.ask("/api/draft", {"prompt": "a half-written <frog>", "care": "draft", "seed": "8"})
    page = visitor.get("/").get_data(as_text=True)
    assert "a half-written &lt;frog&gt;</textarea>" in page
    assert 'value="draft" checked' in page


def test_the_page_that_is_reloaded_shows_the_job_that_is_being_developed(visitor: Visitor, here: Pages) -> None:
    here.easel.hold.clear()
    job = visitor.develop()
    visitor.develop("a green frog")
    page = visitor.get("/").get_data(as_text=True)
    assert f'data-job="{job}"' in page
    assert "then 1 more of yours" in page
    here.easel.hold.set()


def test_cancel_stops_the_job_and_keeps_the_words(visitor: Visitor, here: Pages) -> None:
    here.easel.hold.clear()
    job = visitor.develop("a green frog")
    answer = visitor.post(f"/jobs/{job}/cancel")
    assert answer.status_code == 303
    here.easel.hold.set()
    assert ended(visitor, job)["state"] == "cancelled"
    page = visitor.get("/").get_data(as_text=True)
    assert "Cancelled" in page
    assert "a green frog</textarea>" in page


def test_a_model_of_one_size_offers_no_shapes(visitor: Visitor) -> None:
    assert 'name="shape"' in visitor.get("/").get_data(as_text=True)
    page = pages(model=ONE_SIZE).visitor().get("/").get_data(as_text=True)
    assert 'name="shape"' not in page
    assert 'name="width"' not in page
    assert "192 × 192 pixels" in page


def test_a_model_that_was_trained_on_open_captions_has_no_examples_and_knows_every_word() -> None:
    visitor = pages(model=replace(MODEL, vocabulary=None, sizes=Sizes((512, 512), 8, 256, 1024, 512 * 768, 4))).visitor()
    assert 'name="example"' not in visitor.get("/").get_data(as_text=True)
    assert visitor.ask("/api/draft", {"prompt": "quarterly report"}).json["notices"] == []     # type: ignore[index]
    assert visitor.get("/model").status_code == 200


def test_times_are_steps_until_they_are_measured_and_seconds_afterwards(visitor: Visitor, here: Pages) -> None:
    assert "20 steps" in visitor.get("/").get_data(as_text=True)
    here.easel.step_seconds = 0.05
    visitor.picture(steps="3")
    page = visitor.get("/").get_data(as_text=True)
    assert "about 1 s" in page
    assert visitor.ask("/api/draft", {"count": "4"}).json["times"]["standard"] == "about 4 s"     # type: ignore[index]


# ── Notices ───────────────────────────────────────────────────────────────────


def test_a_notice_stands_beside_the_form_and_does_not_block(visitor: Visitor) -> None:
    job = visitor.develop("a red apple for a@b.example")
    page = visitor.get(f"/jobs/{job}").get_data(as_text=True)
    assert "This looks like an e-mail address." in page
    assert ended(visitor, job)["state"] == "done"


def test_a_prompt_of_which_the_model_knows_nothing_is_said_quietly(visitor: Visitor) -> None:
    said = visitor.ask("/api/draft", {"prompt": "quarterly report"}).json
    assert said is not None
    assert [notice["kind"] for notice in said["notices"]] == ["unknown_words"]


# ── Bad input ─────────────────────────────────────────────────────────────────

GOOD = {"prompt": "a red apple"}
BAD: list[tuple[str, dict[str, str]]] = [
    ("an empty prompt", {"prompt": ""}),
    ("whitespace", {"prompt": " \n\t "}),
    ("control characters", {"prompt": "a red\x00apple"}),
    ("an escape", {"prompt": "a \x1b[31mred apple"}),
    ("100,000 characters", {"prompt": "x" * 100_000}),
    ("a long negative prompt", {"negative_prompt": "x" * 4_001}),
    ("no steps", {"steps": "0"}),
    ("negative steps", {"steps": "-1"}),
    ("10,000 steps", {"steps": "10000"}),
    ("steps that are no number", {"steps": "NaN"}),
    ("steps with a point", {"steps": "2.5"}),
    ("endless guidance", {"guidance_scale": "inf"}),
    ("guidance that is no number", {"guidance_scale": "nan"}),
    ("a width that is no multiple", {"width": "129"}),
    ("a width beyond the model", {"width": "4096"}),
    ("an area beyond the model", {"width": "288", "height": "288"}),
    ("an unknown sampler", {"sampler": "magic"}),
    ("an unknown spacing", {"spacing": "magic"}),
    ("karras with ddim", {"sampler": "ddim", "spacing": "karras"}),
    ("a negative seed", {"seed": "-1"}),
    ("a seed beyond 64 bits", {"seed": str(2**63)}),
    ("no pictures", {"count": "0"}),
    ("too many pictures", {"count": "5"}),
    ("an unknown care", {"care": "perfect"}),
    ("an unknown shape", {"shape": "round"}),
    ("an unknown field", {"lora": "x"}),
]


@pytest.mark.parametrize("bad", [form for _, form in BAD], ids=[name for name, _ in BAD])
def test_bad_input_gets_a_sentence_and_begins_nothing(visitor: Visitor, here: Pages, bad: dict[str, str]) -> None:
    answer = visitor.post("/jobs", GOOD | bad)
    page = answer.get_data(as_text=True)
    assert answer.status_code == 400
    said = page.partition('id="problem-what">')[2].partition("<")[0]
    assert not said[0].islower()
    assert said.endswith(".")
    assert here.jobs._jobs == {}
    assert here.vault.held == 0
    if prompt := (GOOD | bad)["prompt"].strip():
        assert prompt in page
    script = visitor.ask("/jobs", GOOD | bad)
    assert script.status_code == 400
    assert script.json is not None
    assert set(script.json) == {"error", "message", "hint"}
    assert here.jobs._jobs == {}


def test_a_field_that_was_refused_is_shown_to_the_one_who_filled_it(visitor: Visitor) -> None:
    page = visitor.post("/jobs", GOOD | {"steps": "0"}).get_data(as_text=True)
    assert '<details class="more" id="more" open>' in page
    assert 'value="0"' in page


# ── What can go wrong ─────────────────────────────────────────────────────────


def test_a_full_queue_says_when_to_try_again_and_keeps_the_words(here: Pages, visitor: Visitor) -> None:
    here.easel.hold.clear()
    for _ in range(5):
        visitor.develop()
    answer = visitor.post("/jobs", {"prompt": "a green frog"})
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["Retry-After"]) <= 600
    page = answer.get_data(as_text=True)
    assert "All 4 places in the queue are taken." in page
    assert "a green frog</textarea>" in page
    script = visitor.ask("/jobs", GOOD)
    assert (script.status_code, script.json and script.json["error"]) == (429, "queue_full")
    assert len(here.jobs._jobs) == 5
    here.easel.hold.set()


def test_an_engine_error_says_what_happened_and_what_to_do(visitor: Visitor) -> None:
    job = ended(visitor, visitor.develop("fail please"))
    assert (job["state"], job["message"]) == ("failed", "The engine ran out of memory.")
    page = visitor.get("/").get_data(as_text=True)
    assert "The engine ran out of memory." in page
    assert "Try a smaller picture, or fewer at once." in page
    assert "fail please</textarea>" in page


def test_an_engine_that_dies_costs_its_job_alone_and_the_next_one_waits_for_the_new_engine(here: Pages, visitor: Visitor) -> None:
    assert ended(visitor, visitor.develop("die please"))["message"] == "The engine stopped while it was developing this picture."
    until(lambda: here.jobs.model is None)
    job = visitor.develop("a green frog")
    assert "The engine is being started again. Yours is next." in visitor.get("/").get_data(as_text=True)
    assert "this is the model that it had" in visitor.get("/model").get_data(as_text=True)
    here.easel.start()
    assert ended(visitor, job)["state"] == "done"


def test_before_the_first_engine_the_page_says_so_and_keeps_the_words() -> None:
    here = pages(engine=False)
    visitor = here.visitor()
    assert visitor.get("/model").status_code == 200
    answer = visitor.post("/jobs", {"prompt": "a green frog"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "3")
    assert "a green frog</textarea>" in answer.get_data(as_text=True)


def test_a_full_vault_ends_the_job_with_what_to_do(here: Pages, visitor: Visitor) -> None:
    here.vault._capacity = 1
    assert ended(visitor, visitor.develop())["hint"] == "Forget some pictures, then develop it again."


def test_what_is_unforeseen_tells_nobody_anything(
    here: Pages, visitor: Visitor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError(CANARY)

    caplog.set_level(logging.DEBUG)
    visitor.get("/")
    monkeypatch.setattr(here.jobs, "submit", broken)
    answers: list[TestResponse] = [
        visitor.post("/jobs", {"prompt": CANARY}), visitor.ask("/jobs", {"prompt": CANARY}), visitor.post("/jobs", {"prompt": ""})
    ]
    assert [answer.status_code for answer in answers] == [500, 500, 400]
    assert here.failures == [500, 500]
    assert CANARY in answers[0].get_data(as_text=True)      # what was written comes back in the form: the search does find it
    assert CANARY not in answers[1].get_data(as_text=True)
    assert "Traceback" not in answers[0].get_data(as_text=True)
    out, err = capfd.readouterr()
    assert CANARY not in out + err + caplog.text
    assert caplog.records == []


def test_a_prompt_is_in_no_address_no_title_and_no_header(visitor: Visitor, here: Pages) -> None:
    job = visitor.develop(CANARY)
    ended(visitor, job)
    picture = job_of(visitor, job)["pictures"][0]["id"]
    for path in ("/", f"/jobs/{job}", f"/pictures/{picture}", f"/pictures/{picture}/png", f"/api/jobs/{job}", "/pictures"):
        answer = visitor.get(path)
        text = answer.data.decode("utf-8", "replace")
        assert CANARY not in str(answer.headers)
        assert CANARY not in text.partition("<title>")[2].partition("</title>")[0]
        for attribute in ("href", "src", "action", "alt", "download", "title"):
            assert not any(CANARY in part.partition('"')[0] for part in text.split(f'{attribute}="')[1:])
    assert CANARY in visitor.get("/").get_data(as_text=True)
    assert CANARY not in repr(vars(here.app)) + repr(here.jobs.jobs) + repr(list(here.jobs._jobs.values()))


# ── Forgetting ────────────────────────────────────────────────────────────────


def test_a_forgotten_picture_is_gone(visitor: Visitor, here: Pages) -> None:
    picture = visitor.picture()
    assert visitor.get(f"/pictures/{picture}/png").data.startswith(b"\x89PNG")
    assert visitor.post(f"/pictures/{picture}/forget").status_code == 303
    assert visitor.get(f"/pictures/{picture}/png").status_code == 404
    assert visitor.post(f"/pictures/{picture}/forget").status_code == 404
    assert here.vault.held == 0
    assert visitor.get("/").status_code == 200


def test_forgetting_everything_ends_the_session_and_what_is_being_developed(visitor: Visitor, here: Pages) -> None:
    other = here.visitor()
    kept = other.picture()
    visitor.picture(CANARY)
    here.easel.hold.clear()
    job = visitor.develop(CANARY)
    answer = visitor.post("/forget")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/forgotten")
    assert "darkroom-8000=;" in answer.headers["Set-Cookie"]
    assert '"cache"' in answer.headers["Clear-Site-Data"]
    here.easel.hold.set()
    assert visitor.get(f"/jobs/{job}").status_code == 404
    assert CANARY not in visitor.get("/").get_data(as_text=True)
    until(lambda: here.jobs._running is None)
    (session,) = here.vault.sessions()
    assert [stored.request.prompt for stored in here.vault.images(session)] == ["a red apple"]
    assert other.get(f"/pictures/{kept}/png").status_code == 200


def test_the_old_cookie_of_a_forgotten_session_is_nobodys(here: Pages) -> None:
    visitor = here.visitor()
    cookie = visitor.get("/").headers["Set-Cookie"].split(";")[0]
    picture = visitor.picture()
    client = here.app.test_client(use_cookies=False)
    assert client.get(f"/pictures/{picture}/png", base_url="http://127.0.0.1:8000", headers={"Cookie": cookie}).status_code == 200
    visitor.post("/forget")
    assert client.get(f"/pictures/{picture}/png", base_url="http://127.0.0.1:8000", headers={"Cookie": cookie}).status_code == 404


def test_the_contact_sheet_shows_every_picture_of_the_session(visitor: Visitor) -> None:
    visitor.picture(count="3", steps="1")
    assert visitor.get("/pictures").get_data(as_text=True).count("download=") == 3
