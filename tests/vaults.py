"""Vaults for tests: in temporary folders, with pictures that can be recognized."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from appliance.request import GenerationRequest
from appliance.vault.state import FailedUnlocks
from appliance.vault.volume import ImageId, SessionId, Vault
from tests.bundles import DESCRIPTION

ANNA, BERT = SessionId("anna"), SessionId("bert")


def vault(*, capacity: int) -> Vault:
    """Return an empty vault in session mode, in a folder that goes when the vault is no longer used."""
    folder = tempfile.TemporaryDirectory(prefix="vault-of-a-test-", ignore_cleanup_errors=True)
    made = Vault.ephemeral(Path(folder.name), capacity=capacity)
    weakref.finalize(made, folder.cleanup)
    return made


def asked(prompt: str = "a red apple") -> GenerationRequest:
    """Return a request with this prompt."""
    return GenerationRequest.parse({"prompt": prompt}, DESCRIPTION, fresh_seed=1)


def put(vault: Vault, png: bytes = b"\x89PNG" + bytes(20_000), session: SessionId = ANNA, prompt: str = "a red apple") -> ImageId:
    """Put a picture into the vault."""
    return vault.put(session, png, asked(prompt), seed=7, variant="fp32")


@dataclass
class Counted:
    """Failed unlocks, in memory."""

    failed: FailedUnlocks = field(default_factory=FailedUnlocks)

    def failed_unlocks(self) -> FailedUnlocks:
        return self.failed

    def count_failed_unlock(self, boot: str, boottime: int) -> FailedUnlocks:
        self.failed = FailedUnlocks(self.failed.count + 1, boot, boottime)
        return self.failed

    def forgive_failed_unlocks(self) -> None:
        self.failed = FailedUnlocks()
