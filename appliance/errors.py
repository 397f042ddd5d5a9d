"""Every error that Darkroom raises on purpose.

    DarkroomError                 exit code 1
    ├── BadRequest                2   the caller asked for something that cannot be had; nothing was changed
    │   └── QueueFull             2   … at this moment: try again after `retry_after` seconds
    ├── VerificationRefused       3   a bundle is not what a trusted key signed
    ├── VaultError                4   the vault is locked, damaged or full
    ├── EngineError               5   the engine could not make the picture
    │   └── Cancelled             5   … because it was told to stop
    └── NotSealed                 6   the process could not be closed off

Rules, in order:

1. A message is one lowercase sentence without a final period: place, fact, expected and got. What to do about it is
   the `hint`, on a line of its own.
2. No message holds content: no prompt, no image, no key, no passphrase, no path inside the vault.
3. `reason` is a stable slug for programs; the message is for people and may change.

>>> str(BadRequest("steps", "steps must be a whole number from 1 to 150", hint="try 20"))
'steps must be a whole number from 1 to 150'
"""

from __future__ import annotations


class DarkroomError(Exception):
    """The root: a reason slug, a sentence for people, and what to do about it."""

    exit_code = 1

    def __init__(self, reason: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint


class BadRequest(DarkroomError):
    """The request is refused before anything was begun: no file, no job, no changed state."""

    exit_code = 2


class QueueFull(BadRequest):
    """No place is free in the queue; `retry_after` is in whole seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__("queue_full", message, hint=f"try again in {retry_after} seconds")
        self.retry_after = retry_after


class VerificationRefused(DarkroomError):
    """A bundle was refused; `place` is the file or manifest field, relative to the bundle."""

    exit_code = 3

    def __init__(
        self,
        reason: str,
        place: str,
        fact: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        said = [f"{label} {value}" for label, value in (("expected", expected), ("got", got)) if value is not None]
        super().__init__(reason, f"{place}: {fact}" + (f" ({', '.join(said)})" if said else ""), hint=hint)
        self.place = place
        self.fact = fact
        self.expected = expected
        self.got = got


class VaultError(DarkroomError):
    """The vault is locked, damaged or full."""

    exit_code = 4


class EngineError(DarkroomError):
    """The engine could not make the picture."""

    exit_code = 5


class Cancelled(EngineError):
    """A generation was stopped on request, within one step."""

    def __init__(self) -> None:
        super().__init__("cancelled", "the generation was cancelled")


class NotSealed(DarkroomError):
    """A process could not be closed off, or a way out was found open."""

    exit_code = 6
