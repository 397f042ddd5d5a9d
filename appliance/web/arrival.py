"""How much of a request has arrived: the framing of HTTP/1.1, apart from any socket, thread or clock.

`Arrival` is fed whatever came, in whatever pieces, and gives back whole requests as the exact bytes that came, or a
`Refusal`. Where a request ends is decided here alone: the parser behind it is given one request's bytes and then the end,
so that a parser which disagreed could read too little or run dry, but never take a part of one request for the next.

What decides is the shortest beginning of the bytes that decides at all, so that no way of cutting them changes the outcome:

1. One empty line before a request is allowed (RFC 9112, 2.2). A line feed without its carriage return is refused: 400.
2. A request line longer than its limit: 414. A head longer than its limit: 431. Nothing beyond the limits is kept.
3. Transfer-Encoding is refused, chunked included: 411 (RFC 9112, 6.3), or 400 where it stands beside Content-Length or in
   HTTP/1.0. No browser sends a form that way, and two ways to say where a request ends are what smuggling is made of.
4. Content-Length is said once, in ASCII digits, or 400. More than `Sizes.body` is refused before a byte of it is read: 413.
5. `Expect` is answered with 417 (RFC 9110, 10.1.1: the client repeats the request without it); HTTP/1.0 may say it in vain.

    arrival = Arrival(Sizes())
    arrival.feed(b"GET / HTTP/1.1\\r\\nHost: a\\r")
    arrival.take()                  # None: the head is not whole
    arrival.feed(b"\\n\\r\\n")
    arrival.take()                  # the request's bytes
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_EMPTY_LINE: Final = b"\r\n"
_END_OF_HEAD: Final = b"\r\n\r\n"
_BARE_LINE_FEED: Final = re.compile(rb"(?<!\r)\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")


@dataclass(frozen=True)
class Sizes:
    """The most bytes of a request line, of a head (that line and the last empty one included), and of a body."""

    line: int = 2048
    head: int = 16 * 1024
    body: int = 256 * 1024      # as `border.LARGEST_BODY`: two of the longest prompts, with every character four times %XX


class Refusal(Exception):       # refused, not failed
    """A request that is not going to be read to its end: a status, its phrase, a slug, and a sentence for whoever sent it."""

    def __init__(self, status: int, phrase: str, reason: str, message: str) -> None:
        super().__init__(reason)
        self.status, self.phrase, self.reason, self.message = status, phrase, reason, message

    def answer(self, *, as_json: bool) -> bytes:
        """Return the whole answer, after which the connection ends."""
        if as_json:
            body, kind = f'{{"error": "{self.reason}", "message": "{self.message}", "hint": null}}\n', "application/json"
        else:
            body, kind = f"{self.message[0].upper()}{self.message[1:]}.\n", "text/plain; charset=utf-8"
        return (
            f"HTTP/1.1 {self.status} {self.phrase}\r\nConnection: close\r\nCache-Control: no-store\r\nContent-Type: {kind}\r\n"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode("ascii")


class Arrival:
    """What has come on one connection and was not taken yet."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._came = bytearray()
        self._head = 0          # bytes of the head, once it is whole
        self._whole = 0         # bytes of the request, once its head is whole

    @property
    def begun(self) -> bool:
        """Whether any byte of the next request is there."""
        return bool(self._came)

    @property
    def body(self) -> int | None:
        """How many bytes of body the request has, or None while its head is not whole."""
        return self._whole - self._head if self._whole else None

    @property
    def asks_for_json(self) -> bool:
        """Whether a script of the page sent this: it reads the reason of a refusal, and a person the sentence."""
        return re.search(rb"(?im)^accept:[^\n]*application/json", self._came[: self._sizes.head]) is not None

    def feed(self, data: bytes) -> None:
        """Add bytes as they came."""
        self._came += data

    def take(self) -> bytes | None:
        """Return the bytes of the next request once it is whole, None before that. Raises `Refusal`."""
        if not self._whole:
            self._find_the_end()
        if not self._whole or len(self._came) < self._whole:
            return None
        request = bytes(self._came[: self._whole])
        del self._came[: self._whole]
        self._head = self._whole = 0
        return request

    def _find_the_end(self) -> None:
        window = bytes(self._came[: self._sizes.head])
        start = len(_EMPTY_LINE) if window.startswith(_EMPTY_LINE) else 0
        end = window.find(_END_OF_HEAD, start)
        head = window if end < 0 else window[: end + len(_END_OF_HEAD)]
        self._check_lines(head, start)
        if end >= 0:
            self._head = len(head)
            self._whole = len(head) + self._length_of_body(head[start:end])
        elif len(self._came) >= self._sizes.head:
            raise Refusal(431, "Request Header Fields Too Large", "head_too_large", "the request's head is too long")

    def _check_lines(self, head: bytes, start: int) -> None:
        longest = start + self._sizes.line + len(_EMPTY_LINE)
        too_long = len(head) >= longest and head.find(_EMPTY_LINE, start, longest) < 0
        bare = _BARE_LINE_FEED.search(head)
        # The one that shows first decides: the other one's bytes may not have come yet.
        if bare is not None and not (too_long and bare.start() >= longest):
            raise Refusal(400, "Bad Request", "line_end", "a line of the request ends in a way that HTTP does not know")
        if too_long:
            raise Refusal(414, "URI Too Long", "line_too_long", "the request's first line is too long")

    def _length_of_body(self, head: bytes) -> int:
        line, *fields = head.split(b"\r\n")
        old = line.endswith(b" HTTP/1.0")
        lengths, transfer, expects = [], False, False
        for field in fields:
            name, _, value = field.partition(b":")
            match name.lower():
                case b"content-length":
                    lengths.append(value.strip(b" \t"))
                case b"transfer-encoding":
                    transfer = True
                case b"expect":
                    expects = True
        if len(lengths) > 1 or any(_LENGTH.fullmatch(length) is None for length in lengths) or (transfer and (lengths or old)):
            raise Refusal(400, "Bad Request", "length", "the request does not say clearly where it ends")
        if transfer:
            raise Refusal(411, "Length Required", "length_required", "the request must say its length")
        length = int(lengths[0]) if lengths else 0
        if length > self._sizes.body:
            raise Refusal(413, "Content Too Large", "too_large", "that is far more than is read here")
        if expects and not old:
            raise Refusal(417, "Expectation Failed", "expect", "send the request without expecting anything first")
        return length
