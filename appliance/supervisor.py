"""The parent of everything that holds content: it binds, spawns, reaps and ends, and never holds any itself.

    supervisor      one thread, no numpy, no pictures, no prompts
    ├── engine      verifies the bundle, then loads it
    └── gunicorn    answers on the listening socket that was made here
        └── worker  the pages and the pictures

In order:

1. Bind the listening socket, so that a port in use is said before anything is started.
2. Start the engine and wait until it has verified and loaded the model. A refusal ends everything with its exit code.
3. Start gunicorn, hand the engine's wire to the worker, and wait until a request is answered.
4. Only then say ready: to systemd where it listens, and to whoever waits for the address.
5. Watch. An engine that ends is replaced: the worker is given the next one's wire. A worker that ends is a close: what
   it held is gone with it, the engine is ended as well, and both are started afresh. Too many ends in a short time are
   one of their own, and the supervisor gives up with exit code 5.
6. On SIGTERM, SIGINT or SIGHUP: end the worker and the engine, reap both, and return.

The engine and the worker are told where their parent is, and the kernel ends them with it (`seal.confine`).
"""

from __future__ import annotations

import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.config import Config
from appliance.errors import BadRequest, DarkroomError, EngineError, NotSealed, VerificationRefused
from appliance.evidence.journal import Event, Record, records

CLOSING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE: Final = 1.5              # seconds between asking gunicorn to end and ending it
START_LIMIT: Final = 600.0      # seconds for verifying and loading a large model
MOST_ENDS: Final = 5            # … of children within `ENDS_WINDOW` seconds
ENDS_WINDOW: Final = 60.0
NEW_ENGINE: Final = b"E"        # the message that carries an engine's wire to the worker
