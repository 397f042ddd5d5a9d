"""Code that runs inside worker and engine, as it would after somebody had taken them over.

The hook is no part of the product. Python loads a module called `sitecustomize` when it starts, and the supervisor passes
PYTHONPATH on: so a folder of ours, first on that path, is loaded in every process of the appliance. There it opens a FIFO,
waits for the moment at which the process has been closed off, and from then on runs whatever Python code is written into the
FIFO, with everything that the process can do. What came of it is written to a copy of standard error that was made before the
process gave that up.

`alteration` is code that runs in every process before anything of the appliance does, with `role` set to "serve", "engine" or
"pages": it takes a step of the seal away.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import Appliance, eventually, running

ROOT = Path(__file__).parent.parent
_HOOK = '''
import sys
words = sys.orig_argv
role = words[words.index("appliance") + 1] if "appliance" in words[:-1] else ""
if role in ("serve", "engine", "pages"):
    import base64, json, os, threading, time
    from pathlib import Path
    here = Path(__file__).parent
{alteration}
    if role != "serve":
        orders = os.open(here / ("engine" if role == "engine" else "worker"), os.O_RDONLY | os.O_NONBLOCK)
        answers = os.dup(2)     # before the process falls silent: the test's own way out, which the product has not
        from appliance.seal import confine
        close_off = confine.close_off_child

        def obey():
            waiting = b""
            while True:
                try:
                    waiting += os.read(orders, 65536)
                except BlockingIOError:
                    pass
                while b"\\n" in waiting:
                    line, _, waiting = waiting.partition(b"\\n")
                    scope = {{"role": role}}
                    try:
                        exec(compile(base64.b64decode(line), "<taken over>", "exec"), scope)
                        answer = scope.get("answer")
                    except BaseException as error:
                        answer = "failed: " + repr(error)
                    os.write(answers, b"TAKEN " + json.dumps([scope["number"], answer]).encode() + b"\\n")
                time.sleep(0.02)

        def then_obey(*given, **named):
            standing = close_off(*given, **named)
            if role == "engine" or named.get("forked"):
                threading.Thread(target=obey, daemon=True).start()
            return standing

        confine.close_off_child = then_obey
'''


@dataclass
class Taken:
    """A running appliance whose worker and engine do what they are told."""

    appliance: Appliance
    folder: Path
    number: int = 0
    _held: list[int] = field(default_factory=list)

    def order(self, role: str, code: str) -> None:
        """Run `code` inside worker or engine, and do not wait for what it leaves in `answer`."""
        self.number += 1
        order = base64.b64encode(f"number = {self.number}\n{textwrap.dedent(code)}".encode())
        # Held open: a reader that comes late must still find the line.
        self._held.append(fifo := os.open(self.folder / role, os.O_WRONLY))
        os.write(fifo, order + b"\n")

    def inside(self, role: str, code: str, seconds: float = 60.0) -> object:
        """Run `code` inside worker or engine and return what it left in `answer`."""
        self.order(role, code)
        eventually(self._answers, seconds)
        return self._answers()[0]

    def close(self) -> None:
        """Close the FIFOs."""
        while self._held:
            os.close(self._held.pop())

    def _answers(self) -> list[object]:
        found = []
        for line in self.appliance.log().splitlines():
            if line.startswith("TAKEN "):
                number, answer = json.loads(line.removeprefix("TAKEN "))
                if number == self.number:
                    found.append(answer)
        return found


def hook(folder: Path, alteration: str = "") -> dict[str, str]:
    """Write the hook into `folder` and return the environment in which the appliance loads it."""
    (folder / "sitecustomize.py").write_text(
        _HOOK.format(alteration=textwrap.indent(textwrap.dedent(alteration), "    ")), encoding="utf-8"
    )
    for role in ("worker", "engine"):
        with contextlib.suppress(FileExistsError):
            os.mkfifo(folder / role)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@contextlib.contextmanager
def taken_over(
    folder: Path, *options: str, alteration: str = "", launcher: tuple[str, ...] = ()
) -> Iterator[Taken]:
    """Start an appliance with the hook in it."""
    with running(*options, environment=hook(folder, alteration), launcher=launcher) as appliance:
        taken = Taken(appliance, folder)
        with contextlib.closing(taken):
            yield taken
