"""A visitor without JavaScript: keeps the cookie, reads the token off the page, sends forms."""

from __future__ import annotations

import http.client
import json
import re
from typing import NamedTuple
from urllib.parse import urlencode

from tests.conftest import eventually


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")


class Visitor:
    """One browser's session with one appliance."""

    def __init__(self, hostport: str) -> None:
        self.hostport = hostport
        self.cookie = ""
        self.csrf = ""

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, form: dict[str, str], **headers: str) -> Answer:
        if not self.csrf:
            self.enter()
        body = urlencode({**form, "csrf": self.csrf}).encode("ascii")
        return self._ask("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded", **headers})

    def enter(self) -> None:
        page = self.get("/").text
        found = re.search(r'name="csrf" value="([^"]+)"', page)
        assert found is not None
        self.csrf = found[1]

    def develop(self, prompt: str, **fields: str) -> str:
        """Begin a job and return its id."""
        answer = self.post("/jobs", {"prompt": prompt, **fields})
        assert answer.status == 303, answer.text
        return answer.headers["Location"].rpartition("/")[2]

    def job(self, job: str) -> dict[str, object]:
        answer = self.get(f"/api/jobs/{job}")
        assert answer.status == 200
        found = json.loads(answer.body)
        assert isinstance(found, dict)
        return found

    def wait(self, job: str, *states: str) -> dict[str, object]:
        eventually(lambda: self.job(job)["state"] in states, 120)
        return self.job(job)

    def picture(self, job: str) -> bytes:
        """Return the PNG of a job's first picture once it is done."""
        done = self.wait(job, "done", "failed", "cancelled")
        assert done["state"] == "done", done
        pictures = done["pictures"]
        assert isinstance(pictures, list)
        return self.get(f"/pictures/{pictures[0]['id']}/png").body

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        host, _, port = self.hostport.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        try:
            sent = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, path, body, {**({"Cookie": self.cookie} if self.cookie else {}), **sent})
            response = connection.getresponse()
            for cookie in response.headers.get_all("Set-Cookie") or ():
                self.cookie = cookie.split(";")[0]
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()
