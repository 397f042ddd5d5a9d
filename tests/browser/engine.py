"""An engine that draws without a model, at the far end of the real wire, and the pages served over it.

`Easel` answers orders as the engine's process does, so that the queue, the vault and the pages under test are the real
ones. What it draws is a disc on a ground, from the seed; its steps take as long as the test says, and a prompt may name
what should go wrong: `fail please` ends the job with an error, `die please` ends the engine.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO

from PIL import Image, ImageDraw, ImageFilter
from werkzeug.serving import WSGIRequestHandler, make_server

from appliance.engine import wire
from appliance.engine.jobs import JobQueue
from appliance.trust.description import Defaults, ModelDescription, Sizes, Vocabulary
from appliance.vault.volume import Vault
from appliance.web.app import WebSettings, create_app
from appliance.web.room import Seal
from tests.bundles import DESCRIPTION
from tests.vaults import vault as a_vault

EXAMPLES = (
    "a red apple", "a blue umbrella on a yellow background", "a sailboat", "a green frog", "a castle", "an orange cat",
    "a lighthouse",
)
WORDS = ("apple", "umbrella", "sailboat", "frog", "castle", "cat", "red", "blue", "yellow", "green", "orange", "a")
MODEL = replace(
    DESCRIPTION,
    name="Darkroom sampler",
    sizes=Sizes((192, 192), 8, 128, 288, 192 * 192, 4),
    defaults=Defaults("ddim", 20, 2.0, ""),
    notes="A small sampler. It knows a few hundred things, and its pictures are close to its training pictures.",
    vocabulary=Vocabulary(("apple", "umbrella", "sailboat", "frog", "castle", "cat"), WORDS, EXAMPLES),
)
ONE_SIZE = replace(MODEL, sizes=Sizes((192, 192), 8, 192, 192, 192 * 192, 4))


class Easel:
    """An engine at the far end of a job queue's wire."""

    def __init__(self, jobs: JobQueue, *, step_seconds: float = 0.0, model: ModelDescription = MODEL) -> None:
        self._jobs = jobs
        self._model = model
        self._cancelled: set[int] = set()
        self._orders: list[wire.Generate] = []
        self._more = threading.Condition()
        self._end: socket.socket | None = None
        self.step_seconds = step_seconds
        self.hold = threading.Event()       # cleared: the engine waits before its next step
        self.hold.set()

    def start(self) -> None:
        """Say hello to the queue, as a fresh engine does."""
        ours, theirs = socket.socketpair()
        self._end, self._orders = ours, []
        self._jobs.attach(theirs)
        wire.send(ours, wire.Hello(self._model.to_json(), "ab" * 32, "cd" * 32, {"unet/model.onnx": "ef" * 32}, "CC0 1.0\n"))
        threading.Thread(target=self._listen, args=(ours,), daemon=True).start()
        threading.Thread(target=self._work, args=(ours,), daemon=True).start()

    def die(self) -> None:
        """End as a killed engine does: the wire closes in the middle of whatever was said."""
        if self._end is not None:
            with suppress(OSError):
                self._end.shutdown(socket.SHUT_RDWR)
        with self._more:
            self._more.notify_all()

    def _listen(self, end: socket.socket) -> None:
        with suppress(OSError):
            while (order := wire.receive_order(end)) is not None:
                with self._more:
                    if isinstance(order, wire.Cancel):
                        self._cancelled.add(order.job)
                    else:
                        self._orders.append(order)
                    self._more.notify_all()
        with self._more:
            self._orders.append(wire.Generate(0, {}))
            self._more.notify_all()

    def _work(self, end: socket.socket) -> None:
        with suppress(OSError), end:
            while True:
                with self._more:
                    self._more.wait_for(lambda: self._orders)
                    order = self._orders.pop(0)
                if order.job == 0:
                    return
                self._develop(end, order)

    def _develop(self, end: socket.socket, order: wire.Generate) -> None:
        fields = order.fields
        prompt, seed, steps = str(fields["prompt"]), int(str(fields["seed"])), int(str(fields["steps"]))
        for number in range(1, int(str(fields["count"])) + 1):
            picture = draw(seed + number - 1, int(str(fields["width"])), int(str(fields["height"])))
            for step in range(1, steps + 1):
                threading.Event().wait(self.step_seconds)
                self.hold.wait(30)
                if order.job in self._cancelled:
                    return wire.send(end, wire.Failed(order.job, "cancelled", "the generation was cancelled", None))
                if step == 3 and "die please" in prompt:
                    return self.die()
                if step == 3 and "fail please" in prompt:
                    return wire.send(end, wire.Failed(
                        order.job, "no_memory", "the engine ran out of memory", "try a smaller picture, or fewer at once"
                    ))
                report = wire.Progress(order.job, number, step, steps, self.step_seconds or 0.001, haze(picture, step / steps))
                wire.send(end, report)
            wire.send(end, wire.Picture(order.job, number, seed + number - 1, "fp32", _bytes(picture, "PNG")))
        wire.send(end, wire.Finished(order.job))
        return None


def draw(seed: int, width: int, height: int) -> Image.Image:
    """Return a disc on a ground, in colours of the seed's own."""
    chance = random.Random(seed)
    ground, disc = (tuple(chance.randrange(40, 230) for _ in range(3)) for _ in range(2))
    picture = Image.new("RGB", (width, height), ground)
    side = min(width, height)
    ImageDraw.Draw(picture).ellipse(
        (width / 2 - side * 0.35, height / 2 - side * 0.35, width / 2 + side * 0.35, height / 2 + side * 0.35), fill=disc
    )
    return picture


def haze(picture: Image.Image, done: float) -> bytes:
    """Return a preview, a small JPEG in which `done` of the picture shows through noise."""
    small = picture.resize((picture.width // 4, picture.height // 4))
    noise = Image.effect_noise(small.size, 120).convert("RGB").filter(ImageFilter.GaussianBlur(1))
    return _bytes(Image.blend(noise, small, done), "JPEG")


def _bytes(picture: Image.Image, kind: str) -> bytes:
    out = BytesIO()
    picture.save(out, kind)
    return out.getvalue()


@dataclass
class Served:
    """The pages, being served on loopback."""

    url: str
    easel: Easel
    jobs: JobQueue
    vault: Vault
    failures: list[int] = field(default_factory=list)
    seal: Seal = field(default_factory=Seal)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None:
        return


@contextmanager
def served(
    *, step_seconds: float = 0.0, model: ModelDescription = MODEL, capacity: int = 4, port: int = 0, **settings: int
) -> Iterator[Served]:
    """Serve the pages on a free port of loopback until the block ends."""
    vault = a_vault(capacity=64 << 20)
    jobs = JobQueue(vault, capacity=capacity, on_engine=lambda _: None)
    easel = Easel(jobs, step_seconds=step_seconds, model=model)
    with socket.create_server(("127.0.0.1", port)) as listener:
        number = listener.getsockname()[1]
        failures: list[int] = []
        seal = Seal()
        app = create_app(
            jobs=jobs, vault=vault, on_failure=failures.append, seal=seal,
            settings=WebSettings(allowed_hosts=(f"127.0.0.1:{number}", f"localhost:{number}"), **settings),
        )
        server = make_server("127.0.0.1", number, app, threaded=True, request_handler=_Quiet, fd=listener.fileno())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        easel.start()
        try:
            yield Served(f"http://127.0.0.1:{number}", easel, jobs, vault, failures, seal)
        finally:
            easel.hold.set()
            easel.die()
            server.shutdown()
            thread.join()
            server.server_close()
