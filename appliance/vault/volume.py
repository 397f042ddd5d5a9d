"""The vault: pictures and how they were made, by session.

For now the vault is the memory of the worker and nothing else. No byte of it reaches a file system, and it ends with the
process that holds it; the machine's swap is the operator's to switch off. It is bounded: when it is full, a new picture
is refused and the ones that are kept stay.

A session sees its own pictures. Another session's id is answered exactly as an id that never was.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import NewType

from appliance.errors import VaultError
from appliance.request import GenerationRequest

SessionId = NewType("SessionId", str)
ImageId = NewType("ImageId", str)


@dataclass(frozen=True)
class StoredImage:
    """One finished picture: PNG bytes without metadata, and the request that made it."""

    id: ImageId
    png: bytes = field(repr=False)
    request: GenerationRequest
    seed: int
    variant: str
    made_at: float      # Unix time


class Vault:
    """Pictures of every session, in this process's memory alone; safe to use from several threads."""

    def __init__(self, *, capacity: int) -> None:
        """Make an empty vault that holds at most `capacity` bytes of pictures."""
        self._capacity = capacity
        self._held = 0
        self._images: dict[SessionId, dict[ImageId, StoredImage]] = {}
        self._lock = threading.Lock()

    def put(self, session: SessionId, png: bytes, request: GenerationRequest, *, seed: int, variant: str) -> ImageId:
        """Keep one picture. Raises `VaultError` when it does not fit; nothing that is kept is lost by that."""
        image = StoredImage(ImageId(secrets.token_urlsafe(16)), png, request, seed, variant, time.time())
        with self._lock:
            if self._held + len(png) > self._capacity:
                raise VaultError(
                    "vault_full", "there is no room for another picture", hint="forget some pictures, then develop it again"
                )
            self._images.setdefault(session, {})[image.id] = image
            self._held += len(png)
        return image.id

    def get(self, session: SessionId, image: ImageId) -> StoredImage | None:
        """Return the session's picture; None for an unknown id and for another session's."""
        with self._lock:
            return self._images.get(session, {}).get(image)

    def images(self, session: SessionId) -> tuple[StoredImage, ...]:
        """Return the session's pictures, newest first."""
        with self._lock:
            return tuple(reversed(self._images.get(session, {}).values()))

    def delete(self, session: SessionId, image: ImageId) -> bool:
        """Drop one picture; False when the session has none of that id."""
        with self._lock:
            dropped = self._images.get(session, {}).pop(image, None)
            if dropped is not None:
                self._held -= len(dropped.png)
        return dropped is not None

    def end(self, session: SessionId) -> None:
        """Drop every picture of the session."""
        with self._lock:
            for image in self._images.pop(session, {}).values():
                self._held -= len(image.png)
