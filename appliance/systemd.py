"""What is said to systemd, where it started the appliance, and what it wants to hear."""

from __future__ import annotations

import os


def watchdog_interval() -> float:
    """Return how often systemd wants to hear of life, in seconds, halved as sd_watchdog_enabled(3) advises; 0: never."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000


def notify(state: str) -> None:
    """Tell systemd, where it listens (sd_notify(3))."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon

        daemon.notify(state)
