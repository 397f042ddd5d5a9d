"""32 bytes as people copy them: thirteen groups of four characters and a check character.

    1  0ABCD-  2  …      digits and capital letters without I, L, O and U (Crockford's base 32)

A group holds 20 bits. Its fifth character is the check: (group's number · 2²⁰ + value) mod 37, in Crockford's 37 signs. Any one
wrong character, two neighbours that changed places, and two groups that did are each found, and the group is named. The last
group has four bits to spare, which are zero. Small letters are read as capitals, O as 0, I and L as 1, and what separates the
groups (white space, dashes) is not looked at.
"""

from __future__ import annotations

from typing import Final

from appliance.errors import BadRequest

GROUPS: Final = 13
_DIGITS: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CHECKS: Final = _DIGITS + "*~$=U"
_READ_AS: Final = str.maketrans("OIL", "011")


def to_groups(value: bytes) -> str:
    """Return 32 bytes as groups, in lines of five.

    >>> to_groups(bytes(32)).split()[0]
    '0000U'
    """
    if len(value) != 32:
        raise ValueError("32 bytes are written as groups")
    number = int.from_bytes(value, "big") << 4
    groups = []
    for place in range(GROUPS):
        held = number >> (20 * (GROUPS - 1 - place)) & 0xFFFFF
        groups.append("".join(_DIGITS[held >> shift & 31] for shift in (15, 10, 5, 0)) + _check(place, held))
    return "\n".join(" ".join(groups[start : start + 5]) for start in range(0, GROUPS, 5))


def from_groups(untrusted: str, what: str) -> bytes:
    """Return the 32 bytes. Raises `BadRequest`, which names the group that is wrong and quotes nothing."""
    if len(untrusted) > 1000:
        raise BadRequest("groups", f"{what}: too long for {GROUPS} groups of five characters")
    typed = "".join(untrusted.upper().replace("-", " ").split()).translate(_READ_AS)
    if len(typed) != 5 * GROUPS:
        raise BadRequest(
            "groups", f"{what}: not {GROUPS} groups of five characters",
            hint=f"{len(typed)} characters were given, {5 * GROUPS} are wanted",
        )
    number = 0
    for place in range(GROUPS):
        group = typed[5 * place : 5 * place + 5]
        values = [_DIGITS.find(character) for character in group[:4]]
        held = sum(value << shift for value, shift in zip(values, (15, 10, 5, 0), strict=True))
        if min(values) < 0 or group[4] != _check(place, held):
            raise BadRequest("groups", f"{what}: group {place + 1} is not as it was printed", hint="compare its five characters")
        number = number << 20 | held
    if number & 15:
        raise BadRequest("groups", f"{what}: the last group is not as it was printed", hint="compare its five characters")
    return (number >> 4).to_bytes(32, "big")


def _check(place: int, held: int) -> str:
    return _CHECKS[((place + 1 << 20) + held) % 37]
