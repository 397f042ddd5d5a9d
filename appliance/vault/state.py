"""What outlives a wipe: one small folder of the appliance's own, and no content in it.

    state/              0700, of the user that the appliance runs as
    ├── device.pem      the device's signing key: ECDSA P-256, PKCS#8, made at first use
    ├── counters        numbers that only grow
    ├── unlocks         failed unlocks since the last good one
    ├── audit/          the chain of records (`evidence/chain.py`)
    └── certificates/   certificates of sanitization and their signatures (`evidence/certificate.py`)

None of its keys is one of the vault's: who has the whole folder can sign in the device's name, and can open no vault.

Rules, in order:

1. A folder is reached from its parent's descriptor, is not a link, is this user's, and nobody else may enter it. A file is a
   regular one with one name, is this user's, and nobody else may read it. Anything else is refused, with what to do.
   The state folder's own path is the operator's word: links on the way to it are followed, the last part being one is not.
2. A file is written whole or not at all: a temporary one beside it, fsync, rename, fsync of the folder. A crash leaves the
   old file or the new one, and at most a temporary one, which the next write takes away.
3. What is damaged is refused and never taken for empty: a count of failed unlocks that cannot be read gives no new tries.
   A file that is *missing* reads as never written; who can remove files here is the appliance's own user, or root.
4. Nothing here is content. Values are numbers, keys, and what `evidence/` made: no prompt, picture, name or address.

One process writes: the supervisor. `State` is used by one thread; a second process may read.

>>> default_folder({"XDG_STATE_HOME": "/home/ann/.state"}, superuser=False)
PosixPath('/home/ann/.state/darkroom')
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import VaultError

LARGEST_FILE: Final = 4 << 20       # bytes; the largest that belongs here is a file of audit records, of one MiB
MOST_NAMES: Final = 10_000          # in one folder
GREATEST: Final = 2**53 - 1         # what a counter can hold: every reader of JSON agrees on whole numbers up to here

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_TEMPORARY = ".new-"
_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Counter(enum.Enum):
    """The numbers that only grow. A value is the line's name in the file."""

    VAULT_GENERATION = "vault_generation"   # the highest that was seen in vault and header: a replay of both is older
    ERASES_BEGUN = "erases_begun"           # more begun than done: the next start finishes one
    ERASES_DONE = "erases_done"


@dataclass(frozen=True)
class FailedUnlocks:
    """How many unlocks failed in a row, and when the last one did: milliseconds of CLOCK_BOOTTIME in the boot `boot`."""

    count: int = 0
    boot: str = "0" * 32        # the kernel's boot id, in hex without dashes
    boottime: int = 0


@dataclass(frozen=True)
class Folder:
    """One folder, held by its descriptor; every name in it is a plain one, and no link is followed.

    `place` is how refusals call it: relative to the state folder.
    """

    place: str
    descriptor: int

    def names(self) -> list[str]:
        """Return the names in it, sorted, the temporary ones left out. Raises `VaultError`."""
        with self._told(""):
            with os.scandir(self.descriptor) as entries:
                found = [entry.name for _, entry in zip(range(MOST_NAMES + 1), entries, strict=False)]
            if len(found) > MOST_NAMES:
                raise VaultError("state_full", f"{self.place}: more than {MOST_NAMES} files")
        return sorted(name for name in found if not name.startswith(_TEMPORARY))

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None where there is none. Raises `VaultError` for anything that is not our file."""
        descriptor = self.open(name, os.O_RDONLY)
        if descriptor is None:
            return None
        with self._told(name), os.fdopen(descriptor, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
            if len(content) > LARGEST_FILE:
                raise VaultError("state_damaged", f"{self._at(name)}: larger than {LARGEST_FILE} bytes")
        return content

    def open(self, name: str, flags: int) -> int | None:
        """Return a descriptor of a file that is there, after looking at whose it is; None where there is none."""
        self._plain(name)
        with self._told(name):
            try:
                descriptor = os.open(name, flags | _OPEN, dir_fd=self.descriptor)
            except FileNotFoundError:
                return None
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise _refused(self._at(name), "not a regular file", "take it away")
                if status.st_nlink != 1:
                    raise _refused(self._at(name), f"a file with {status.st_nlink} names", "remove the other hard links")
                _check_owner(self._at(name), status, "600")
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def create(self, name: str) -> int:
        """Return a descriptor of a new, empty file that can be appended to. Raises `VaultError` where there is one."""
        self._plain(name)
        with self._told(name):
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
            descriptor = os.open(name, flags | _OPEN, 0o600, dir_fd=self.descriptor)
            try:
                os.fsync(self.descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def write(self, name: str, content: bytes) -> None:
        """Replace a file by `content`, whole or not at all. Raises `VaultError`; the old file is then still there."""
        self._plain(name)
        temporary = _TEMPORARY + name
        with self._told(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self.descriptor)        # what a crash left
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600, dir_fd=self.descriptor
            )
            try:
                try:
                    write_all(descriptor, content)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.descriptor)
                raise
            os.fsync(self.descriptor)

    def remove(self, name: str) -> None:
        """Take a file's name away; none is no error. Its blocks are the file system's: see `destroy`."""
        self._plain(name)
        with self._told(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.descriptor)
            os.fsync(self.descriptor)

    def destroy(self, name: str) -> None:
        """Overwrite a file with zeros in place, then take its name away; none is no error.

        In place means the same blocks on a file system that does not copy on write; flash may keep the old ones
        (NIST SP 800-88 Rev. 2; cryptsetup FAQ 5.19).
        """
        descriptor = self.open(name, os.O_WRONLY)
        if descriptor is None:
            return
        with self._told(name):
            try:
                write_all(descriptor, bytes(min(os.fstat(descriptor).st_size, LARGEST_FILE)))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.remove(name)

    def below(self, name: str) -> Folder:
        """Return the folder `name` in this one; it is made, 0700, where there is none. The caller closes it."""
        self._plain(name)
        with self._told(name):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.descriptor)
                os.fsync(self.descriptor)
            return Folder(self._at(name), _open_folder(self._at(name), name, self.descriptor))

    def lock(self) -> None:
        """Keep every other process from locking this folder, until it is closed. Raises `VaultError` if one has."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VaultError(
                "state_busy", f"{self.place}: another process is writing there",
                hint="the running appliance is the one that writes: close it, or ask it with darkroom audit",
            ) from None

    def close(self) -> None:
        """Give the descriptor back, and with it the lock."""
        os.close(self.descriptor)

    def _at(self, name: str) -> str:
        return f"{self.place}/{name}" if name else self.place

    def _plain(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError("names of state files are fixed by the program")

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what the file system says into a `VaultError` that names the place."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _refused(self._at(name), "a symbolic link", "put the file itself there") from None
            said = os.strerror(error.errno or 0).lower()
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            raise VaultError(
                "state_full" if full else "state_unusable", f"{self._at(name)}: {said}",
                hint="make room on the state folder's file system" if full else None,
            ) from None


@dataclass(frozen=True)
class State:
    """The state folder, open. Use it as a context, or close it.

    >>> with State.open(Path("/var/lib/darkroom")) as state:    # doctest: +SKIP
    ...     state.advance(Counter.VAULT_GENERATION)
    """

    root: Folder
    audit: Folder
    certificates: Folder

    @classmethod
    def open(cls, path: Path) -> State:
        """Open the folder at `path`, and make it where there is none. Raises `VaultError` for one that others can enter."""
        place = path.name or str(path)
        try:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            root = Folder(place, _open_folder(place, str(path), None))
        except OSError as error:
            raise VaultError(
                "state_unusable", f"{place}: the state folder cannot be used ({os.strerror(error.errno or 0).lower()})",
                hint="name a folder of this user's own, which no one else can enter",
            ) from None
        opened = [root]
        try:
            for name in ("audit", "certificates"):
                opened.append(root.below(name))     # one by one: the second may be refused
        except BaseException:
            for folder in opened:
                folder.close()
            raise
        return cls(*opened)

    def close(self) -> None:
        """Give every descriptor back."""
        for folder in (self.certificates, self.audit, self.root):
            folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def device_key(self) -> ec.EllipticCurvePrivateKey:
        """Return the device's signing key, on P-256; it is made and kept if there is none. Raises `VaultError`."""
        with self._alone():
            pem = self.root.read("device.pem")
            if pem is None:
                key = ec.generate_private_key(ec.SECP256R1())
                self.root.write("device.pem", key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ))
                return key
        try:
            found = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            found = None        # the library's text may quote what it read
        if not isinstance(found, ec.EllipticCurvePrivateKey) or not isinstance(found.curve, ec.SECP256R1):
            raise VaultError(
                "state_damaged", f"{self.root.place}/device.pem: not an ECDSA key on P-256 in PEM",
                hint="put the saved key back; with a new one, signatures of the old one are checked with its public key",
            )
        return found

    def counter(self, counter: Counter) -> int:
        """Return the counter's value; 0 before it was first advanced. Raises `VaultError` for a damaged file."""
        return self._counters()[counter.value]

    def advance(self, counter: Counter, to: int | None = None) -> int:
        """Raise the counter by one, or to `to`, and return its value, which is then on the disk.

        Raises `VaultError` if `to` is below the value: a counter never steps back.
        """
        with self._alone():
            values = self._counters()
            wanted = values[counter.value] + 1 if to is None else to
            if not values[counter.value] <= wanted <= GREATEST:
                raise VaultError(
                    "counter_back", f"{counter.value}: cannot go from {values[counter.value]} to {wanted}",
                    hint="something older than the last state was put back",
                )
            values[counter.value] = wanted
            self._write_lines("counters", values)
        return wanted

    def failed_unlocks(self) -> FailedUnlocks:
        """Return how many unlocks have failed since the last good one. Raises `VaultError` for a damaged file."""
        values = self._lines("unlocks", r"count (\d{1,16})\nboot ([0-9a-f]{32})\nboottime (\d{1,16})\n")
        return FailedUnlocks() if values is None else FailedUnlocks(int(values[0]), values[1], int(values[2]))

    def count_failed_unlock(self, boot: str, boottime: int) -> FailedUnlocks:
        """Count one more and return the count. Count *before* a passphrase is tried: a kill then gives no free try."""
        with self._alone():
            failed = FailedUnlocks(min(self.failed_unlocks().count + 1, GREATEST), boot, boottime)
            self._write_lines("unlocks", {"count": failed.count, "boot": failed.boot, "boottime": failed.boottime})
        return failed

    def forgive_failed_unlocks(self) -> None:
        """Begin to count anew, after a good unlock."""
        with self._alone():
            self.root.remove("unlocks")

    def _counters(self) -> dict[str, int]:
        names = [counter.value for counter in Counter]
        values = self._lines("counters", "".join(rf"{name} (\d{{1,16}})\n" for name in names))
        return dict.fromkeys(names, 0) if values is None else dict(zip(names, map(int, values), strict=True))

    def _lines(self, name: str, form: str) -> tuple[str, ...] | None:
        content = self.root.read(name)
        if content is None:
            return None
        found = re.fullmatch(form, content.decode("ascii", "replace"), re.ASCII)
        if found is None:
            raise VaultError(
                "state_damaged", f"{self.root.place}/{name}: damaged",
                hint="put it back from a copy; removing it makes every count begin at nothing",
            )
        return found.groups()

    def _write_lines(self, name: str, values: Mapping[str, int | str]) -> None:
        self.root.write(name, "".join(f"{key} {value}\n" for key, value in values.items()).encode("ascii"))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process reads and then writes here: two that count at once must not count one."""
        fcntl.flock(self.root.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.root.descriptor, fcntl.LOCK_UN)


def default_folder(environment: Mapping[str, str], *, superuser: bool) -> Path:
    """Return where the state is kept when nobody said: systemd's StateDirectory=, /var/lib, or the XDG state folder."""
    if given := environment.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])        # systemd.exec(5): several are separated by colons
    if superuser:
        return Path("/var/lib/darkroom")
    home = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local" / "state")
    return Path(home) / "darkroom"


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte: write(2) may take fewer than it was given."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left):]


def _open_folder(place: str, name: str, above: int | None) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=above)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:     # Linux says ENOTDIR for a link that is opened as a folder
            raise _refused(place, "not a folder, or a symbolic link to one", "name the folder itself") from None
        raise
    try:
        _check_owner(place, os.fstat(descriptor), "700")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_owner(place: str, status: os.stat_result, wanted: str) -> None:
    if status.st_uid != os.geteuid():
        raise _refused(place, f"belongs to user {status.st_uid}, not to {os.geteuid()}", "run as the user that it belongs to")
    if status.st_mode & 0o077:
        raise _refused(
            place, f"open to others (mode {stat.S_IMODE(status.st_mode):03o})",
            f"chmod {wanted} it; consider that what is in it may have been read or changed",
        )


def _refused(place: str, fact: str, hint: str) -> VaultError:
    return VaultError("state_refused", f"{place}: {fact}", hint=hint)
