"""The certificate of sanitization: what a close or an erase did, item by item, and what it could not do.

Its fields are those that NIST SP 800-88 asks a record of sanitization for (Rev. 2, sections 4.5 and 4.6; Rev. 1, appendix G is
the printed form): what was sanitized, by which technique, with which tool and version, how it was verified, what is left, when,
and who. The persons, the medium's labels and its destination are not the appliance's to know; the page has lines for them.

What it claims, in this order:

1. A technique for each item, and nothing for the medium. An ephemeral key that was destroyed is a cryptographic erase of the
   vault's volume. It purges no disk, and the certificate says `medium: not sanitized as a whole`.
2. Verified is what somebody looked at: read back, looked for and absent, or a process that was reaped. Else it says so.
3. An item that is not wholly erased says what remains, and why. An item that is may say so too: flash keeps old blocks.
4. The time is the machine's own and marked unverified. Beside it stand CLOCK_BOOTTIME and the number and digest of the audit
   record, which orders it among everything else.

A certificate is canonical JSON (`canonical.py`, the part of RFC 8785 without numbers' and texts' special cases) with a detached
signature: `openssl dgst -sha256 -verify device.pub.pem -signature certificate.sig certificate.json`. Every word in it is from
a closed list and every number is whole, so no content can get in.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from appliance.evidence.canonical import GREATEST, Value, decode, encode, refuse
from appliance.evidence.records import Mode, Moment, Trigger, is_digest
from appliance.evidence.signature import Signed, check
from appliance.trust.key import TrustedKey
from appliance.vault.state import Folder

FORM: Final = "darkroom certificate of sanitization 1"
STANDARD: Final = "NIST SP 800-88 Rev. 2"
MEDIUM: Final = "not sanitized as a whole"
LARGEST_CERTIFICATE: Final = 16 << 10       # bytes

_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}")


class Act(enum.StrEnum):
    """Which of the two verbs it was."""

    CLOSE = "close"
    ERASE = "erase"


class What(enum.StrEnum):
    """What can be sanitized, or be left."""

    VOLUME_KEY = "volume_key"
    PAGES_MEMORY = "pages_memory"
    ENGINE_MEMORY = "engine_memory"
    ACCELERATOR_MEMORY = "accelerator_memory"
    KEY_SLOTS = "key_slots"
    VAULT_FILE = "vault_file"
    VAULT_JOURNAL = "vault_journal"
    LEFTOVERS = "leftovers"
    HOST_VOLUME = "host_volume"
    KEY_MEDIUM = "key_medium"
    SWAP = "swap"


class Technique(enum.StrEnum):
    """What was done to it."""

    CRYPTOGRAPHIC_ERASE = "cryptographic_erase"
    PROCESS_ENDED = "process_ended"
    OVERWRITE = "overwrite"
    TRUNCATE = "truncate"
    UNLINK = "unlink"
    TRIM = "trim"


class Verification(enum.StrEnum):
    """How it was looked at afterwards."""

    READ_BACK = "read_back"
    ABSENT = "absent"
    REAPED = "reaped"
    NONE = "none"


class Outcome(enum.StrEnum):
    """How it ended."""

    ERASED = "erased"
    PARTLY = "partly"
    KEPT = "kept"           # on purpose: a close leaves a persistent vault
    FAILED = "failed"


class Remains(enum.StrEnum):
    """What could not be erased, or may be left all the same, and why."""

    FLASH_SPARE_AREA = "flash_spare_area"
    COPY_ON_WRITE = "copy_on_write"
    COPIES_ELSEWHERE = "copies_elsewhere"
    HARD_LINKS = "hard_links"
    IMMUTABLE = "immutable"
    READ_ONLY = "read_only"
    NOT_A_FILE = "not_a_file"
    OTHER_FILE_SYSTEM = "other_file_system"
    DISK_ERROR = "disk_error"
    OUT_OF_TIME = "out_of_time"
    NOT_REACHED = "not_reached"
    CIPHERTEXT_AND_SLOTS = "ciphertext_and_slots"
    DRIVER_NOT_ASKED = "driver_not_asked"


_SAID: Final[Mapping[str, str]] = {
    What.VOLUME_KEY: "the vault's volume key, in memory",
    What.PAGES_MEMORY: "memory of the process that serves the pages (prompts, pictures, sessions)",
    What.ENGINE_MEMORY: "memory of the engine (prompt, latents, model)",
    What.ACCELERATOR_MEMORY: "memory of the accelerator",
    What.KEY_SLOTS: "key slots, the wrapped volume key",
    What.VAULT_FILE: "the vault's file",
    What.VAULT_JOURNAL: "the vault's write-ahead log",
    What.LEFTOVERS: "temporary files of the appliance",
    What.HOST_VOLUME: "the host's encrypted volume",
    What.KEY_MEDIUM: "key file on a removable medium",
    What.SWAP: "swap of the host",
    Technique.CRYPTOGRAPHIC_ERASE: "cryptographic erase",
    Technique.PROCESS_ENDED: "process ended",
    Technique.OVERWRITE: "overwrite, one pass",
    Technique.TRUNCATE: "truncate",
    Technique.UNLINK: "unlink",
    Technique.TRIM: "trim",
    Verification.READ_BACK: "yes, read back",
    Verification.ABSENT: "yes, looked for and absent",
    Verification.REAPED: "yes, its parent reaped the process",
    Verification.NONE: "no",
    Outcome.ERASED: "erased",
    Outcome.PARTLY: "erased in part",
    Outcome.KEPT: "kept, as a close does",
    Outcome.FAILED: "not erased",
    Remains.FLASH_SPARE_AREA: "flash may keep overwritten blocks in its spare area",
    Remains.COPY_ON_WRITE: "the file system writes elsewhere and may keep the old blocks",
    Remains.COPIES_ELSEWHERE: "copies or backups that were made elsewhere are not reached",
    Remains.HARD_LINKS: "the file has another name",
    Remains.IMMUTABLE: "the file is immutable",
    Remains.READ_ONLY: "the file system is read-only",
    Remains.NOT_A_FILE: "something else stood in the file's place",
    Remains.OTHER_FILE_SYSTEM: "another file system was mounted there",
    Remains.DISK_ERROR: "the disk reported an error",
    Remains.OUT_OF_TIME: "the time for it was over",
    Remains.NOT_REACHED: "it is not the appliance's to reach",
    Remains.CIPHERTEXT_AND_SLOTS: "ciphertext and key slots stay; who holds a key can open them",
    Remains.DRIVER_NOT_ASKED: "clearing is left to the driver and was not looked at",
}

# What can be said truly: a process is not read back, a cryptographic erase is verified by what held the key.
_VERIFIABLE: Final[Mapping[Technique, frozenset[Verification]]] = {
    Technique.CRYPTOGRAPHIC_ERASE: frozenset({Verification.REAPED, Verification.READ_BACK, Verification.ABSENT}),
    Technique.PROCESS_ENDED: frozenset({Verification.REAPED}),
    Technique.OVERWRITE: frozenset({Verification.READ_BACK}),
    Technique.TRUNCATE: frozenset({Verification.READ_BACK}),
    Technique.UNLINK: frozenset({Verification.ABSENT}),
    Technique.TRIM: frozenset({Verification.READ_BACK}),
}

BY_HAND: Final = (
    ("Sanitization performed by", ("name", "title", "organization", "location", "phone", "date", "signature")),
    ("Validation by", ("name", "title", "organization", "location", "phone", "date", "signature")),
    ("Medium", (
        "manufacturer", "model", "serial number", "property number", "type", "source", "classification before",
        "classification after", "data backed up, and where",
    )),
    ("Destination of the medium", ("internal reuse, external reuse, recycling, manufacturer, other", "details")),
)


@dataclass(frozen=True)
class Item:
    """One thing, what was done to it, how that was verified, and what remains."""

    what: What
    techniques: tuple[Technique, ...]
    verifications: tuple[Verification, ...]     # one for each technique
    outcome: Outcome
    remains: tuple[Remains, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an item that claims more than it shows. Raises `VerificationRefused`."""
        if len(set(self.techniques)) != len(self.techniques) or len(self.techniques) != len(self.verifications):
            refuse(self.what, "not one verification for each technique")
        for technique, verification in zip(self.techniques, self.verifications, strict=True):
            if verification is not Verification.NONE and verification not in _VERIFIABLE[technique]:
                refuse(self.what, f"{technique} is not verified by {verification}")
        if list(self.remains) != sorted(set(self.remains)):
            refuse(self.what, "what remains is not sorted, or said twice")
        if self.outcome in {Outcome.ERASED, Outcome.PARTLY} and not self.techniques:
            refuse(self.what, "erased by nothing")
        if self.outcome is not Outcome.ERASED and not self.remains:
            refuse(self.what, "not erased, and nothing said of what remains")
        if self.outcome is Outcome.KEPT and self.techniques:
            refuse(self.what, "kept, and something was done to it")


class Section(NamedTuple):
    """A part of the page: its title, and rows of a label and a value. An empty value is a line to be filled in by hand."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Certificate:
    """What is certified. Made only with what agrees with itself: else `VerificationRefused`."""

    act: Act
    mode: Mode
    trigger: Trigger
    items: tuple[Item, ...]     # in order of `What`'s words, none twice
    milliseconds: int           # from the trigger to the volume key being gone
    moment: Moment              # when it was made, by the machine's own clocks
    record: int                 # the audit record of the close or erase …
    digest: str                 # … and its digest, in hex
    device: str                 # the fingerprint of the key that signs, in hex
    version: str                # of Darkroom

    def __post_init__(self) -> None:
        """Hold the certificate to what the fields say."""
        place = "certificate"
        if not _VERSION.fullmatch(self.version) or not is_digest(self.digest) or not is_digest(self.device):
            refuse(place, "not a version or digests")
        for number in (self.milliseconds, self.record):
            if type(number) is not int or not 0 <= number <= GREATEST:
                refuse(place, "not whole numbers")
        names = [item.what for item in self.items]
        if not names or names != sorted(set(names)):
            refuse(place, "its items are not sorted, or one is there twice, or none")
        if What.VOLUME_KEY not in names:
            refuse(place, "it says nothing about the volume key")
        kept = [item for item in self.items if item.outcome is Outcome.KEPT]
        if kept and (self.act is Act.ERASE or self.mode is Mode.SESSION):
            refuse(place, "only the close of a persistent vault keeps something")

    @property
    def complete(self) -> bool:
        """Whether every item that was to be erased was."""
        return all(item.outcome in {Outcome.ERASED, Outcome.KEPT} for item in self.items)

    def as_bytes(self) -> bytes:
        """Return the canonical bytes that are signed."""
        items: list[Value] = [
            {
                "what": item.what.value, "techniques": [each.value for each in item.techniques],
                "verified": [each.value for each in item.verifications], "outcome": item.outcome.value,
                "remains": [each.value for each in item.remains],
            }
            for item in self.items
        ]
        return encode({
            "form": FORM, "standard": STANDARD, "medium": MEDIUM, "act": self.act.value, "mode": self.mode.value,
            "trigger": self.trigger.value, "items": items, "milliseconds_to_key_gone": self.milliseconds,
            "time": self.moment.time, "boottime": self.moment.boottime, "boot": self.moment.boot, "time_verified": False,
            "complete": self.complete, "record": self.record, "record_digest": self.digest, "device": self.device,
            "tool": "darkroom", "version": self.version,
        })

    @classmethod
    def parse(cls, untrusted: bytes, place: str = "certificate") -> Certificate:
        """Return the certificate in `untrusted`. Raises `VerificationRefused`; the signature is not looked at here."""
        values = decode(untrusted, place, largest=LARGEST_CERTIFICATE)
        held = values.get("items")
        if not isinstance(held, list):
            refuse(place, "not a certificate of sanitization")
        missing = object()

        def get(key: str) -> object:
            found = values.get(key, missing)
            if found is missing:
                refuse(place, f"{key} is missing")
            return found

        def whole(key: str) -> int:
            found = get(key)
            if type(found) is not int:
                refuse(f"{place}, {key}", "not a whole number")
            return found

        made = cls(
            _word(Act, get("act"), f"{place}, act"), _word(Mode, get("mode"), f"{place}, mode"),
            _word(Trigger, get("trigger"), f"{place}, trigger"), tuple(_item(each, place) for each in held),
            whole("milliseconds_to_key_gone"), Moment.of({key: get(key) for key in ("time", "boottime", "boot")}, place),
            whole("record"), str(get("record_digest")), str(get("device")), str(get("version")),
        )
        # Written again it must be the same: so there is no key beside these, and each constant says what it must.
        if made.as_bytes() != untrusted:
            refuse(place, "not a certificate of sanitization", expected=FORM)
        return made

    @classmethod
    def read(cls, signed: Signed, device: TrustedKey, place: str = "certificate") -> Certificate:
        """Return the certificate that the device signed. Raises `VerificationRefused`; nothing is parsed that it did not sign."""
        check(signed, device, place)
        return cls.parse(signed.content, place)

    def sections(self, signed: Signed) -> tuple[Section, ...]:
        """Return the page, part by part; it is bound to the signed file by that file's digest."""
        items = tuple(Section(f"Item: {_SAID[item.what]}", _rows(item)) for item in self.items)
        return (
            Section("Certificate of sanitization", (
                ("Standard", f"{STANDARD}, sections 4.5 and 4.6"),
                ("Act", f"{self.act} of a {self.mode} vault, by {self.trigger.replace('_', ' ')}"),
                ("Complete", "yes" if self.complete else "NO, see the items"),
                ("Medium", f"{MEDIUM}; what is certified is each item below"),
                ("Tool", f"darkroom {self.version}"),
                ("Time (the machine's own, unverified)", self.moment.as_text()),
                ("Time since the machine's start", f"{self.moment.boottime} ms, boot {self.moment.boot}"),
                ("From trigger to key gone", f"{self.milliseconds} ms"),
            )),
            *items,
            Section("Evidence", (
                ("Audit record", f"{self.record}, sha256:{self.digest}"),
                ("Device key", f"sha256:{self.device}"),
                ("Certificate file", f"sha256:{signed.digest}"),
                ("Signature", signed.signature.hex()),
            )),
            *(Section(f"{title} (by hand)", tuple((label, "") for label in labels)) for title, labels in BY_HAND),
        )

    def as_text(self, signed: Signed) -> str:
        """Return the page as plain text, to be printed."""
        lines: list[str] = []
        for section in self.sections(signed):
            lines += ["", section.title.upper() if not lines else section.title, "-" * len(section.title)]
            lines += [f"{label + ':':<40} {value or '_' * 36}" for label, value in section.rows]
        return "\n".join(lines[1:]) + "\n"


def keep(certificates: Folder, certificate: Certificate, signed: Signed) -> str:
    """Put a certificate and its signature into the folder, and return the name that both files begin with.

    The signature comes first, so a certificate that is there has one. Doing it again changes nothing.
    """
    name = f"certificate-{certificate.record:012}"
    certificates.write(f"{name}.sig", signed.signature)
    certificates.write(f"{name}.json", signed.content)
    return name


def _rows(item: Item) -> tuple[tuple[str, str], ...]:
    done = tuple(
        (_SAID[technique].capitalize(), f"verified: {_SAID[verification]}")
        for technique, verification in zip(item.techniques, item.verifications, strict=True)
    )
    remains = tuple(("Remains", _SAID[each]) for each in item.remains)
    return (("Outcome", _SAID[item.outcome]), *done, *remains)


_Word = TypeVar("_Word", bound=enum.StrEnum)


def _word(words: type[_Word], untrusted: object, place: str) -> _Word:
    found = next((word for word in words if word.value == untrusted), None)
    if found is None:
        refuse(place, "not a word that belongs there", expected=", ".join(words))
    return found


def _words(words: type[_Word], untrusted: object, place: str) -> tuple[_Word, ...]:
    if not isinstance(untrusted, list):
        refuse(place, "not a list of words")
    return tuple(_word(words, each, place) for each in untrusted)


def _item(untrusted: object, place: str) -> Item:
    if not isinstance(untrusted, dict) or set(untrusted) != {"what", "techniques", "verified", "outcome", "remains"}:
        refuse(place, "not an item")
    return Item(
        _word(What, untrusted["what"], f"{place}, what"), _words(Technique, untrusted["techniques"], f"{place}, techniques"),
        _words(Verification, untrusted["verified"], f"{place}, verified"),
        _word(Outcome, untrusted["outcome"], f"{place}, outcome"), _words(Remains, untrusted["remains"], f"{place}, remains"),
    )
