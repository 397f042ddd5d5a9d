"""The border of the pages: who is answered, what is read, and what every answer carries."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from appliance.web.border import HEADERS, LARGEST_BODY, Request
from tests.browser.client import HOST, ORIGIN, Pages, pages


@pytest.fixture
def here() -> Iterator[Pages]:
    made = pages()
    yield made
    made.easel.hold.set()
    made.easel.die()


# ── Host ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "127.0.0.1:8000.evil", "", "a b"])
def test_a_name_that_is_not_ours_is_answered_with_nothing(here: Pages, host: str) -> None:
    answer = here.app.test_client().get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert b"<" not in answer.data
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("host", [HOST, "localhost:8000", "LOCALHOST:8000"])
def test_our_own_names_are_answered(here: Pages, host: str) -> None:
    assert here.app.test_client().get("/", headers={"Host": host}).status_code == 200


# ── Origin and token ──────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://127.0.0.1:8001"},
        {"Origin": "null"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        {"Origin": f"{ORIGIN}.evil.example"},
    ],
)
def test_a_form_that_another_site_sent_is_refused_even_with_the_token(here: Pages, headers: dict[str, str]) -> None:
    client = here.app.test_client()
    page = client.get("/", base_url=ORIGIN).get_data(as_text=True)
    token = page.partition('name="csrf" value="')[2].partition('"')[0]
    answer = client.post("/jobs", base_url=ORIGIN, data={"csrf": token, "prompt": "a red apple"}, headers=headers)
    assert answer.status_code == 403
    assert here.jobs._jobs == {}


@pytest.mark.parametrize("headers", [{}, {"Origin": ORIGIN}, {"Origin": "null", "Sec-Fetch-Site": "same-origin"}])
def test_a_form_of_our_own_is_taken_with_whatever_a_browser_says_of_it(here: Pages, headers: dict[str, str]) -> None:
    client = here.app.test_client()
    page = client.get("/", base_url=ORIGIN).get_data(as_text=True)
    token = page.partition('name="csrf" value="')[2].partition('"')[0]
    answer = client.post("/jobs", base_url=ORIGIN, data={"csrf": token, "prompt": "a red apple"}, headers=headers)
    assert answer.status_code == 303


@pytest.mark.parametrize("path", ["/jobs", "/examples", "/forget", "/api/draft", "/jobs/x/cancel", "/pictures/x/forget", "/pictures/x/again"])
def test_nothing_is_done_without_the_token_of_the_session(here: Pages, path: str) -> None:
    visitor, other = here.visitor(), here.visitor()
    visitor.get("/")
    other.get("/")
    for token in ("", "x", other.csrf, visitor.csrf + "x", visitor.csrf[:-1]):
        assert visitor.post(path, {"csrf": token}).status_code == 403
    assert here.jobs._jobs == {}


def test_a_form_of_a_session_that_has_ended_comes_back_with_its_prompt_and_works_when_sent_again(here: Pages) -> None:
    visitor = here.visitor()
    answer = visitor.post("/jobs", {"csrf": "of a session that ended", "prompt": "a green frog"})
    assert answer.status_code == 403
    assert "a green frog" in answer.get_data(as_text=True)
    visitor.csrf = answer.get_data(as_text=True).partition('name="csrf" value="')[2].partition('"')[0]
    assert visitor.post("/jobs", {"prompt": "a green frog"}).status_code == 303


def test_a_script_of_a_session_that_has_ended_is_told_the_new_token_by_develop_alone(here: Pages) -> None:
    visitor = here.visitor()
    visitor.csrf = "of a session that ended"
    assert "csrf" not in (visitor.ask("/api/draft", {"prompt": "x"}).json or {})
    said = visitor.ask("/jobs", {"prompt": "a red apple"})
    assert said.status_code == 403
    assert said.json is not None
    visitor.csrf = said.json["csrf"]
    assert visitor.ask("/jobs", {"prompt": "a red apple"}).status_code == 201


# ── The body ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"prompt=%FF%FE", 400),
        (b"prompt=\xff\xfe", 400),
        (b"prompt=%C3%28", 400),
        (b"prompt=a&prompt=b", 400),
        (b"prompt", 400),
        (b"&".join(b"f%d=1" % n for n in range(200)), 400),
        (b"prompt=" + b"x" * LARGEST_BODY, 413),
    ],
)
def test_a_body_that_is_no_small_plain_form_is_refused_and_begins_nothing(here: Pages, body: bytes, status: int) -> None:
    visitor = here.visitor()
    visitor.get("/")
    answer = visitor.send("/jobs", b"csrf=" + visitor.csrf.encode() + b"&" + body)
    assert answer.status_code == status
    assert here.jobs._jobs == {}


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
def test_only_urlencoded_forms_are_read(here: Pages, kind: str) -> None:
    visitor = here.visitor()
    visitor.get("/")
    body = urlencode({"csrf": visitor.csrf, "prompt": "a red apple"}).encode()
    assert visitor.send("/jobs", body, Content_Type=kind).status_code == 415


def test_a_form_whose_length_is_not_said_is_limited_too(here: Pages) -> None:
    builder = EnvironBuilder(path="/jobs", method="POST", base_url=ORIGIN, headers=[("Transfer-Encoding", "chunked")])
    environ = builder.get_environ()
    environ["wsgi.input_terminated"] = True
    with tempfile.TemporaryFile() as endless:
        endless.truncate(10 * LARGEST_BODY)
        environ["wsgi.input"] = endless
        environ.pop("CONTENT_LENGTH", None)
        _, status, _ = run_wsgi_app(here.app, environ, buffered=True)
        assert status.startswith("413")
        assert endless.tell() < 2 * LARGEST_BODY


def test_a_request_keeps_even_a_large_upload_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[object] = []
    for name in ("TemporaryFile", "SpooledTemporaryFile"):
        monkeypatch.setattr(f"werkzeug.formparser.{name}", lambda *a, **k: made.append((a, k)), raising=False)
    part = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + b"C" * 2_000_000 + b"\r\n--x--\r\n"
    builder = EnvironBuilder(method="POST", data=part, content_type="multipart/form-data; boundary=x")
    uploaded = Request(builder.get_environ()).files["f"].read()
    assert uploaded == b"C" * 2_000_000
    assert made == []


# ── Sessions ──────────────────────────────────────────────────────────────────


def test_the_cookie_is_opaque_and_closed_to_scripts_and_other_sites(here: Pages) -> None:
    cookies = {here.visitor().get("/").headers["Set-Cookie"] for _ in range(2)}
    assert len(cookies) == 2
    for cookie in cookies:
        value, *attributes = cookie.split("; ")
        name, _, token = value.partition("=")
        assert name == "darkroom-8000"
        assert len(token) == 43      # 256 bits in base64url
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(attributes)


@pytest.mark.parametrize("path", ["/api/current", "/api/jobs/x", "/jobs/x", "/pictures/x", "/pictures/x/png", "/static/darkroom.css", "/nothing", "/forgotten", "/status"])
def test_only_a_page_begins_a_session(here: Pages, path: str) -> None:
    assert "Set-Cookie" not in here.visitor().get(path).headers


def test_a_link_from_another_site_does_not_bury_the_session(here: Pages) -> None:
    answer = here.visitor().get("/", Sec_Fetch_Site="cross-site")
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers
    assert 'http-equiv="refresh"' in answer.get_data(as_text=True)


ONES_OWN = ["/jobs/{job}", "/api/jobs/{job}", "/api/jobs/{job}/events", "/api/jobs/{job}/preview/1", "/pictures/{picture}",
            "/pictures/{picture}/png", "/pictures/{picture}/seed"]


@pytest.mark.parametrize("path", ONES_OWN)
def test_what_is_another_sessions_is_answered_as_what_never_was(here: Pages, path: str) -> None:
    owner, stranger = here.visitor(), here.visitor()
    picture, job = owner.picture(), owner.develop()
    stranger.get("/")
    assert owner.get(path.format(job=job, picture=picture)).status_code in (200, 204)
    theirs = stranger.get(path.format(job=job, picture=picture))
    unknown = stranger.get(path.format(job="A" * 22, picture="A" * 22))
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.data == unknown.data
    assert dict(theirs.headers) == dict(unknown.headers)


@pytest.mark.parametrize("path", ["/jobs/{job}/cancel", "/pictures/{picture}/forget", "/pictures/{picture}/again"])
def test_nothing_can_be_done_to_what_is_another_sessions(here: Pages, path: str) -> None:
    owner, stranger = here.visitor(), here.visitor()
    picture = owner.picture()
    here.easel.hold.clear()
    job = owner.develop()
    theirs = stranger.post(path.format(job=job, picture=picture))
    unknown = stranger.post(path.format(job="A" * 22, picture="A" * 22))
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.data == unknown.data
    assert owner.get(f"/pictures/{picture}/png").status_code == 200
    here.easel.hold.set()


# ── What every answer carries ─────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/", "/pictures", "/model", "/privacy", "/status", "/forgotten", "/nothing", "/api/current", "/static/darkroom.css", "/jobs"])
def test_every_answer_carries_the_headers(here: Pages, path: str) -> None:
    visitor = here.visitor()
    visitor.get("/")
    answers = [visitor.get(path), visitor.post(path), visitor.post(path, {"csrf": "wrong"}), visitor.get(path, Host="evil.example")]
    for answer in answers:
        assert HEADERS.items() <= dict(answer.headers).items()


def test_the_policy_allows_nothing_but_our_own_files() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) <= {"'none'", "'self'", "'script'"}


def test_no_page_holds_a_script_a_style_or_an_address_from_elsewhere() -> None:
    folder = Path(__file__).parent.parent / "appliance" / "web"
    templates = sorted((folder / "templates").glob("*.html"))
    assert len(templates) > 5
    for page in templates:
        text = page.read_text(encoding="utf-8")
        for forbidden in (" style=", "<style", "javascript:", " onclick", " onload", " onerror", "http://", "https://", "//cdn"):
            assert forbidden not in text, (page.name, forbidden)
        for tag in text.split("<script")[1:]:
            assert tag.split(">", 1)[1].startswith("</script>"), page.name
    for script in (folder / "static").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "localStorage", "sessionStorage",
                          "indexedDB", "pushState", "replaceState", "http://", "https://", "document.cookie"):
            assert forbidden not in text, (script.name, forbidden)
