"""A visitor who speaks to the pages directly: keeps the cookie, reads the token off the page, sends forms."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flask import Flask
from werkzeug.test import TestResponse

from appliance.engine.jobs import JobQueue
from appliance.trust.description import ModelDescription
from appliance.vault.volume import Vault
from appliance.web.app import WebSettings, create_app
from appliance.web.room import Seal
from tests.browser.engine import MODEL, Easel
from tests.vaults import vault as a_vault

HOST = "127.0.0.1:8000"
ORIGIN = f"http://{HOST}"
BROWSER = {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}


@dataclass
class Pages:
    """The application over a real queue and vault, with an engine that draws without a model."""

    app: Flask
    jobs: JobQueue
    vault: Vault
    easel: Easel
    failures: list[int] = field(default_factory=list)
    seal: Seal = field(default_factory=Seal)

    def visitor(self) -> Visitor:
        return Visitor(self.app)


def pages(*, model: ModelDescription = MODEL, capacity: int = 4, engine: bool = True, **settings: int) -> Pages:
    vault = a_vault(capacity=64 << 20)
    jobs = JobQueue(vault, capacity=capacity, on_engine=lambda _: None)
    failures: list[int] = []
    seal = Seal()
    app = create_app(
        jobs=jobs, vault=vault, settings=WebSettings(allowed_hosts=(HOST, "localhost:8000"), **settings),
        on_failure=failures.append, seal=seal,
    )
    easel = Easel(jobs, model=model)
    if engine:
        easel.start()
        until(lambda: jobs.model is not None)
    return Pages(app, jobs, vault, easel, failures, seal)


class Visitor:
    """One browser's session."""

    def __init__(self, app: Flask) -> None:
        self._client = app.test_client()
        self.csrf = ""

    def get(self, path: str, **headers: str) -> TestResponse:
        answer = self._client.get(path, base_url=ORIGIN, headers=_spelt(headers))
        if found := re.search(r'name="csrf" value="([^"]+)"', answer.data.decode("utf-8", "replace")):
            self.csrf = found[1]
        answer.close()
        return answer

    def post(self, path: str, form: dict[str, str] | None = None, **headers: str) -> TestResponse:
        if not self.csrf:
            self.get("/")
        sent = {**BROWSER, **_spelt(headers)}
        answer = self._client.post(path, base_url=ORIGIN, data={"csrf": self.csrf, **(form or {})}, headers=sent)
        answer.get_data()
        answer.close()
        return answer

    def send(self, path: str, body: bytes, **headers: str) -> TestResponse:
        """Send raw bytes as a form."""
        if not self.csrf:
            self.get("/")
        sent = {**BROWSER, "Content-Type": "application/x-www-form-urlencoded", **_spelt(headers)}
        return self._client.post(path, base_url=ORIGIN, data=body, headers=sent)

    def ask(self, path: str, form: dict[str, str] | None = None) -> TestResponse:
        """Ask as the page's script does."""
        accept = {"Accept": "application/json"}
        return self.get(path, **accept) if form is None else self.post(path, form, **accept)

    def develop(self, prompt: str = "a red apple", **fields: str) -> str:
        answer = self.post("/jobs", {"prompt": prompt, **fields})
        assert answer.status_code == 303, answer.get_data(as_text=True)
        return answer.headers["Location"].rpartition("/")[2]

    def picture(self, prompt: str = "a red apple", **fields: str) -> str:
        """Develop one and return its id."""
        job = self.develop(prompt, **fields)
        until(lambda: self.ask(f"/api/jobs/{job}").json["state"] == "done")     # type: ignore[index]
        found: str = self.ask(f"/api/jobs/{job}").json["pictures"][0]["id"]     # type: ignore[index]
        return found


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def _spelt(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
