"""Run a session of a persistent vault with a fault at every n-th write, reopen it, and print what was lost.

    LD_PRELOAD=faults.so python -m tests.vault_faults FOLDER faults.so EVERY

The session unlocks, keeps a picture, deletes one, keeps another, adds a key slot and closes. Prints `points N lost M` last.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

from appliance.errors import VaultError
from appliance.vault.keys import KeyFile
from appliance.vault.locked import LockedVault, UnlockedVault
from tests.vaults import ANNA, Counted, put

STICK = KeyFile(bytes(range(64)))
ALLOWED = ([b"kept"], [b"next", b"kept"], [b"next"], [b"last", b"next"])     # newest first, as the session goes on


def opened(folder: Path) -> UnlockedVault:
    return LockedVault.at(folder).unlock(STICK, tries=Counted(), capacity=1 << 30)


def session(folder: Path) -> None:
    with opened(folder) as vault:
        (first,) = vault.vault.images(ANNA)
        put(vault.vault, b"next" * 20_000)
        vault.vault.delete(ANNA, first.id)
        put(vault.vault, b"last" * 9_000)
        vault.add(KeyFile(bytes(64)))


def struck(folder: Path, faults: ctypes.CDLL, after: int, kind: int) -> int:
    """Run the session in a child with a fault, and return how it ended: its exit status, or a signal's number, negative."""
    child = os.fork()
    if child == 0:
        faults.faults_begin(after, kind)
        try:
            session(folder)
        except VaultError:
            os._exit(4)
        except BaseException:       # noqa: BLE001     # any other is a defect, and told as one
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_whole(folder: Path) -> bool:
    """Open the vault and say whether it is as it was at some moment of the session."""
    try:
        with opened(folder) as vault:
            found = [vault.vault.get(ANNA, image.id) for image in vault.vault.images(ANNA)]
            return [one.png[:4] for one in found if one is not None] in ALLOWED and vault.vault.damage() == ()
    except VaultError:
        return False


def main() -> None:
    base, every = Path(sys.argv[1]), int(sys.argv[3])
    faults = ctypes.CDLL(sys.argv[2])
    faults.faults_seen.restype = ctypes.c_long
    good, tried = base / "good", base / "tried"
    good.mkdir(0o700)
    LockedVault.init(good, [STICK])
    with opened(good) as vault:
        put(vault.vault, b"kept" * 20_000)
    shutil.copytree(good, tried)
    faults.faults_begin(-1, 0)
    session(tried)
    writes, points, lost = faults.faults_seen(), 0, 0
    for kind, ended in ((0, 4), (1, 4), (2, -9)):
        for after in range(0, writes - 2, every):
            shutil.rmtree(tried)
            shutil.copytree(good, tried)
            points += 1
            how = struck(tried, faults, after, kind)
            if how not in (ended, 0) or not is_whole(tried):
                print(f"lost: kind {kind} after {after} writes, ended with {how}")
                lost += 1
    print(f"points {points} lost {lost}")


if __name__ == "__main__":
    main()
