"""What 500 slow connections cost a visitor: the time of a page without and with them, in turns within one run.

    python -m benchmarks.slow_connections [--connections 500] [--pages 200] [--rounds 3]

Starts the appliance on a free port of loopback. Only the ratio is worth comparing between machines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import Appliance, running
from tests.visitor import Visitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--pages", type=int, default=200, help="in each round, without and with them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    without: list[float] = []
    beside: list[float] = []
    print(f"{_processor()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before")
    with running() as appliance:
        times(appliance, 20)
        for _ in range(options.rounds):
            without += times(appliance, options.pages)
            with crowd(appliance.port, options.connections):
                beside += times(appliance, options.pages)
    for name, part in (("p50", 50), ("p99", 99)):
        alone, crowded = percentile(without, part), percentile(beside, part)
        print(
            f"{name}: {1000 * alone:.2f} ms alone, {1000 * crowded:.2f} ms beside {options.connections}: "
            f"{crowded / alone:.2f} times"
        )


def times(appliance: Appliance, pages: int) -> list[float]:
    """Return the seconds of each of some first pages, each on a connection of its own."""
    visitor = Visitor(appliance.hostport)
    took = []
    for _ in range(pages):
        started = time.perf_counter()
        assert visitor.get("/").status == 200     # noqa: S101
        took.append(time.perf_counter() - started)
    return took


@contextlib.contextmanager
def crowd(port: int, many: int) -> Iterator[None]:
    """Hold many connections that each send a byte of a head a second, and open each anew when it is closed."""
    done = threading.Event()
    sockets = [_slow(port) for _ in range(many)]

    def trickle() -> None:
        while not done.wait(1):
            for number, sock in enumerate(sockets):
                try:
                    sock.send(b"y")
                except OSError:
                    sock.close()
                    sockets[number] = _slow(port)

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for sock in sockets:
            sock.close()


def _slow(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(b"GET / HTTP/1.1\r\nX: ")
    return sock


def percentile(values: list[float], part: int) -> float:
    return statistics.quantiles(values, n=100)[part - 1]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
