"""A bundle's folder, read through one descriptor: what is in it, and each file's bytes, once.

Nothing here is believed: every name is untrusted. What is refused, in order:

1. A name that is not plain (`manifest.plain_path`): `.git`, names that are no UTF-8, deep paths.
2. Everything that is not a regular file with one name, or a folder: symbolic links, hard links, FIFOs, sockets, devices,
   and a folder on which something else is mounted.
3. A folder that holds no file, since no manifest can list it.
4. More files, bytes in a file or bytes in all than `Limits` allow, before any is read.
5. A file that is another one, or of another length, when it is read than it was when it was looked at.

The bundle's own path is the operator's word: links on the way to it, and the folder itself being one, are followed once, at
`open`. What is inside is reached from that descriptor alone, one name at a time and never through a link. Opening does not
block: a FIFO that is slipped in after the look is refused by its descriptor.

Whether a file's device number is its folder's is not asked: on overlay file systems they differ for honest files, and bytes
that are hashed after they were read are as good from one file system as from another.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NoReturn

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.manifest import DEEPEST, LARGEST_SIGNATURE, MOST_FILES, SIGNATURE, plain_path

_LOOK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True)
class Limits:
    """How much a bundle may hold; an SDXL bundle in fp32 is some 14 GiB, its largest file 10 GiB."""

    files: int = MOST_FILES
    file_bytes: int = 16 << 30
    total_bytes: int = 32 << 30


@dataclass(frozen=True)
class Identity:
    """Which file it was, and in what state, when it was looked at; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity in a `stat` result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def opened(bundle: Path) -> Iterator[int]:
    """Give a descriptor of the bundle's folder; `BadRequest` if there is none, or nothing in it."""
    try:
        descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not a usable path"
        raise BadRequest("bundle_missing", f"the model folder cannot be opened ({why})",
                         hint="give the path of a bundle: a folder with model.json and model.sig in it") from None
    try:
        with os.scandir(descriptor) as entries:
            if next(entries, None) is None:
                raise BadRequest("bundle_empty", "the model folder is empty", hint="darkroom-provision export makes a bundle")
        yield descriptor
    finally:
        os.close(descriptor)


def survey(bundle: int, limits: Limits) -> dict[str, Identity]:
    """Return every file below the descriptor `bundle` by its path, the signature included; nothing is read.

    Raises `VerificationRefused`.
    """
    found: dict[str, Identity] = {}
    total = 0
    for path, identity in _files(bundle, "", limits.files):
        if len(found) > limits.files:
            _refuse("bundle_count", path, "too many files", expected=f"at most {limits.files}")
        largest = LARGEST_SIGNATURE if path == SIGNATURE else limits.file_bytes
        if identity.size > largest:
            reason = "signature_size" if path == SIGNATURE else "file_size"
            _refuse(reason, path, "too large", expected=f"at most {largest} bytes", got=str(identity.size))
        total += identity.size
        if total > limits.total_bytes:
            _refuse("bundle_size", path, "the bundle is too large", expected=f"at most {limits.total_bytes} bytes in all")
        found[path] = identity
    return found


def read_once(bundle: int, path: str, seen: Identity) -> bytes:
    """Return the bytes of the file at `path`, which `survey` saw as `seen`.

    One buffer of exactly the file's length is filled, and never copied. Raises `VerificationRefused`.
    """
    *folders, name = path.split("/")
    held = [os.dup(bundle)]
    try:
        for folder in folders:
            held.append(os.open(folder, _LOOK | os.O_DIRECTORY, dir_fd=held[-1]))
        held.append(os.open(name, _LOOK, dir_fd=held[-1]))
        status = os.fstat(held[-1])
        _regular(path, status)
        if Identity.of(status) != seen:
            _refuse("file_changed", path, "changed since it was listed")
        with os.fdopen(held[-1], "rb", closefd=False) as file:
            content = file.read(seen.size)
            if len(content) != seen.size or file.read(1) or Identity.of(os.fstat(held[-1])) != seen:
                _refuse("file_changed", path, "changed while it was read")
    except OSError as error:
        _refuse("file_unreadable", path, f"cannot be read ({os.strerror(error.errno or 0).lower()})")
    finally:
        for descriptor in held:
            os.close(descriptor)
    return content


def compare(listed: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Return if the files found are those listed, the signature aside; else raise `VerificationRefused`."""
    for path in sorted(set(listed) - set(found)):
        _refuse("file_missing", path, "listed in the manifest and not in the folder",
                hint="the copy is incomplete, or a file was renamed: copy the whole folder again")
    for path in sorted(set(found) - set(listed) - {SIGNATURE}):
        _refuse("file_unlisted", path, "in the folder and not listed in the manifest",
                hint="take the file out of the folder; only what was signed may be there")


def _refuse(
    reason: str, path: str, fact: str, *, expected: str | None = None, got: str | None = None, hint: str | None = None
) -> NoReturn:
    # Names come from a disk that may be hostile: no control character of theirs reaches a terminal.
    place = path if plain_path(path) else ascii(path)[:120]
    raise VerificationRefused(reason, place, fact, expected=expected, got=got, hint=hint)


def _files(folder: int, above: str, most: int) -> Iterator[tuple[str, Identity]]:
    """Give every file below the descriptor `folder`, in order of names; `above` is the folder's path with a slash."""
    with os.scandir(folder) as entries:
        # Cut off before sorting: a folder of millions of names is not worth its memory, and `survey` refuses it anyway.
        names = sorted(entry.name for entry in islice(entries, most + 2))
    for name in names:
        path = above + name
        if not plain_path(path):
            _refuse("file_name", path, "not a plain name",
                    expected=f"ASCII letters, digits and . _ + -, no dot or dash first, at most {DEEPEST} parts")
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                _regular(path, status)
                yield path, Identity.of(status)
                continue
            below = os.open(name, _LOOK | os.O_DIRECTORY, dir_fd=folder)
        except OSError as error:
            _refuse("file_unreadable", path, f"cannot be looked at ({os.strerror(error.errno or 0).lower()})")
        try:
            if os.fstat(below).st_dev != os.fstat(folder).st_dev:
                _refuse("foreign_mount", path, "another file system is mounted there")
            empty = True
            for entry in _files(below, path + "/", most):
                empty = False
                yield entry
            if empty:
                _refuse("empty_folder", path, "a folder without a file, which no manifest can list", hint="remove it")
        finally:
            os.close(below)


def _regular(path: str, status: os.stat_result) -> None:
    kinds = {
        stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device", stat.S_IFDIR: "a folder",
    }
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        reason = "file_symlink" if kind == stat.S_IFLNK else "file_special"
        _refuse(reason, path, "not a regular file", got=kinds.get(kind, "something else"),
                hint="put the file itself there")
    if status.st_nlink != 1:
        # Its other name may be where somebody else can write.
        _refuse("file_hardlink", path, "a hard link", expected="one name", got=f"{status.st_nlink} names",
                hint="copy the bundle: cp -r makes files of their own")
