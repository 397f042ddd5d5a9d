"""The head of the chain: one small statement that pins every record up to it, to be taken off the machine.

    {"boot":…,"boottime":…,"device":…,"digest":…,"form":"darkroom audit head 1","sequence":41,"time":…,"tip":…}

`digest` is record 41's, and through `previous` everybody's before it. `tip` says that the device held the chain's key at that
place (`ratchet.tip`): who has the initial key can check it, and nobody who cut the chain's end off can make it. The file is
canonical JSON with a detached signature; on paper it is the sequence number and the digest in groups (`paper.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from appliance.errors import BadRequest
from appliance.evidence.canonical import GREATEST, decode, encode, refuse
from appliance.evidence.paper import from_groups, to_groups
from appliance.evidence.records import Moment, is_digest

FORM: Final = "darkroom audit head 1"
LARGEST_HEAD: Final = 1024      # bytes


@dataclass(frozen=True)
class Head:
    """What the chain ended with: the last record's number and digest, and when this was said."""

    sequence: int
    digest: str
    tip: str            # empty for a head that was copied from paper
    device: str         # the fingerprint of the device's key; empty for a head that was copied from paper
    moment: Moment | None

    def as_bytes(self) -> bytes:
        """Return the canonical bytes that are signed."""
        if self.moment is None:
            raise ValueError("a head from paper is not signed again")
        return encode({
            "form": FORM, "sequence": self.sequence, "digest": self.digest, "tip": self.tip, "device": self.device,
            "time": self.moment.time, "boottime": self.moment.boottime, "boot": self.moment.boot,
        })

    @classmethod
    def parse(cls, untrusted: bytes, place: str = "head") -> Head:
        """Return the head in `untrusted`. Raises `VerificationRefused`; the signature is not looked at here."""
        values = decode(untrusted, place, largest=LARGEST_HEAD)
        if set(values) != {"form", "sequence", "digest", "tip", "device", "time", "boottime", "boot"} or values["form"] != FORM:
            refuse(place, "not a head of an audit chain")
        sequence = values["sequence"]
        if type(sequence) is not int or not 0 <= sequence <= GREATEST:
            refuse(place, "not a sequence number")
        digest, tip, device = (values[key] for key in ("digest", "tip", "device"))
        if not (is_digest(digest) and is_digest(tip) and is_digest(device)):
            refuse(place, "not digests")
        return cls(sequence, str(digest), str(tip), str(device), Moment.of(values, place))

    def as_paper(self) -> str:
        """Return what is printed or written down: the number, and the digest in groups."""
        return f"{self.sequence}\n{to_groups(bytes.fromhex(self.digest))}\n"

    @classmethod
    def from_paper(cls, untrusted: str) -> Head:
        """Return the head that somebody copied from paper. Raises `BadRequest`."""
        number, _, groups = untrusted.strip().partition("\n")
        if not (number.strip().isascii() and number.strip().isdigit() and len(number) < 17):
            raise BadRequest("head_paper", "the first line of a head on paper is its record's number")
        return cls(int(number), from_groups(groups, "the head's digest").hex(), "", "", None)
