"""`darkroom audit`: what an auditor does with the chain, on the appliance or on a machine of their own.

    show         every record, one a line
    verify       what is wrong with the chain; exit code 3 if anything is
    head         the head of now, signed: printed for paper, or as files
    key          the initial key, printed in groups; --forget takes it off the machine, once it was typed back
    certificate  a certificate of sanitization as a page of text, after its signature was checked

The chain is written in `chain.py`, after the papers and standards that `ratchet.py` names (Schneier and Kelsey 1999, RFC 2104 and
5869); what can be detected and what cannot is in `examine.py`. Who holds the initial key: the auditor, on paper. The appliance
makes it when the chain begins, keeps it until `key --forget`, and cannot make it again. docs/audit.md is the auditor's walk.

A key is never an argument: it comes from a file or from standard input. Answers are lines to print.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.errors import BadRequest, VaultError, VerificationRefused
from appliance.evidence.certificate import LARGEST_CERTIFICATE, Certificate
from appliance.evidence.chain import AuditChain, head_at, initial_key
from appliance.evidence.examine import Copy, Report, examine, read_bounded
from appliance.evidence.heads import LARGEST_HEAD, Head
from appliance.evidence.paper import from_groups, to_groups
from appliance.evidence.records import Clock, Line
from appliance.evidence.signature import LARGEST_SIGNATURE, Signed, check, fingerprint, public_pem, sign
from appliance.trust.key import TrustedKey
from appliance.vault.state import State, default_folder

_MOST_TYPED: Final = 1000       # characters of a key or a head that somebody types


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `darkroom audit` its subcommands."""
    commands = parser.add_subparsers(metavar="WHAT", required=True, dest="what")

    show = commands.add_parser("show", help="print every record", allow_abbrev=False)
    _records_option(show)
    show.add_argument("--json", action="store_true", help="print records as JSON, one a line")

    verify = commands.add_parser("verify", help="look for what is wrong with the records", allow_abbrev=False)
    _records_option(verify)
    verify.add_argument("--head", type=Path, metavar="FILE", help="a head taken off earlier; its signature is FILE with .sig")
    verify.add_argument("--paper", type=Path, metavar="FILE", help="a head copied from paper: its number, then its groups")
    verify.add_argument("--device", type=Path, metavar="KEY", help="the device's public key, PEM")
    verify.add_argument("--key-file", metavar="FILE", help="the initial key in groups; - for standard input")

    head = commands.add_parser("head", help="take the head of the chain, signed", allow_abbrev=False)
    _state_option(head)
    head.add_argument("--out", type=Path, metavar="FOLDER", help="write head.json, head.sig and device.pub.pem there")

    key = commands.add_parser("key", help="print the initial key, to be kept on paper", allow_abbrev=False)
    _state_option(key)
    key.add_argument("--forget", action="store_true", help="take it off this machine; the groups are read from standard input")

    certificate = commands.add_parser("certificate", help="print a certificate of sanitization", allow_abbrev=False)
    certificate.add_argument("file", type=Path, metavar="FILE", help="the certificate, JSON; its signature is FILE with .sig")
    certificate.add_argument("--device", type=Path, metavar="KEY", required=True, help="the device's public key, PEM")


def answer(given: argparse.Namespace) -> Iterator[str]:
    """Do what was asked and give the lines to print; what is wrong with the chain is raised after its lines."""
    if given.what == "show":
        return _show(given)
    if given.what == "verify":
        return _verify(given)
    if given.what == "head":
        return _head(given)
    if given.what == "key":
        return _forget(given) if given.forget else _key(given)
    return _certificate(given)


def _state_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="the state folder (default: where serve keeps it)")


def _records_option(parser: argparse.ArgumentParser) -> None:
    _state_option(parser)
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="a copy of the records, not the appliance's own")


def _show(given: argparse.Namespace) -> Iterator[str]:
    report = examine(_copy(given))
    for line in report.lines:
        yield json.dumps(_as_json(line), sort_keys=True) if given.json else _as_text(line)
    for finding in report.findings:
        if not given.json:
            yield str(finding)


def _verify(given: argparse.Namespace) -> Iterator[str]:
    if given.head is not None and given.paper is not None:
        raise BadRequest("head", "one head at a time: --head or --paper")
    device = None if given.device is None else TrustedKey.load(given.device)
    key = None if given.key_file is None else from_groups(_typed(given.key_file), "the initial key")
    head = None
    if given.head is not None:
        if device is None:
            raise BadRequest("device", "a head's signature is checked with the device's key", hint="name it with --device")
        signed = _signed(given.head, LARGEST_HEAD)
        check(signed, device, given.head.name)
        head = Head.parse(signed.content, given.head.name)
    elif given.paper is not None:
        head = Head.from_paper(_typed(str(given.paper)))
    report = examine(_copy(given), initial_key=key, head=head, device=device)
    yield from _as_report(report)
    wrong = [finding for finding in report.findings if finding.wrong]
    if wrong:
        raise VerificationRefused(
            "audit_chain", "audit",
            f"the chain is not what was written ({len(wrong)} findings, the first at record {wrong[0].sequence})",
            hint="keep the state folder as it is, and compare with the head that was taken before",
        )


def _head(given: argparse.Namespace) -> Iterator[str]:
    folder = _folder(given)
    position = Copy.read(folder / "audit").ratchet
    if position is None:
        raise VaultError("audit_damaged", "audit/ratchet: missing or damaged", hint="darkroom audit verify says more")
    with State.open(folder) as state:
        key = state.device_key()
    head = head_at(position, Clock()(), fingerprint(key))
    if given.out is None:
        yield from head.as_paper().splitlines()
        return
    signed = sign(head.as_bytes(), key)
    for name, content in (("head.json", signed.content), ("head.sig", signed.signature), ("device.pub.pem", public_pem(key))):
        _write(given.out / name, content)
    yield f"head at record {head.sequence}, {len(signed.content)} bytes, signed by device {head.device}"


def _key(given: argparse.Namespace) -> Iterator[str]:
    folder = _folder(given)
    with State.open(folder) as state:
        key = initial_key(state.audit)
    if key is None:
        raise BadRequest(
            "initial_key_gone", "the initial key is not on this machine",
            hint="it was taken before, or nothing was recorded yet; move the audit folder away to begin a chain with a new one",
        )
    yield from to_groups(key).splitlines()


def _forget(given: argparse.Namespace) -> Iterator[str]:
    typed = from_groups(_typed("-"), "the initial key")
    with State.open(_folder(given)) as state:
        chain = AuditChain.open(state, Clock())
        try:
            chain.forget_initial_key(typed)
        finally:
            chain.close()
    yield "the initial key is on this machine no longer"


def _certificate(given: argparse.Namespace) -> Iterator[str]:
    signed = _signed(given.file, LARGEST_CERTIFICATE)
    device = TrustedKey.load(given.device)
    yield from Certificate.read(signed, device, given.file.name).as_text(signed).splitlines()


def _folder(given: argparse.Namespace) -> Path:
    folder: Path = given.state or default_folder(os.environ, superuser=os.geteuid() == 0)
    if not (folder / "audit").is_dir():
        raise BadRequest("audit_none", f"{folder.name}: no state folder of an appliance", hint="name it with --state")
    return folder


def _copy(given: argparse.Namespace) -> Copy:
    return Copy.read(given.records if given.records is not None else _folder(given) / "audit")


def _signed(path: Path, largest: int) -> Signed:
    return Signed(read_bounded(path, largest), read_bounded(path.with_suffix(".sig"), LARGEST_SIGNATURE))


def _typed(path: str) -> str:
    """Return a short text from a file, or from standard input. Raises `BadRequest`, and quotes nothing of it."""
    try:
        content = sys.stdin.read(_MOST_TYPED) if path == "-" else read_bounded(Path(path), _MOST_TYPED).decode("ascii")
    except ValueError:
        raise BadRequest("typed", "what was typed is not plain text") from None
    return content


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BadRequest("out", f"{path.name}: cannot be written ({os.strerror(error.errno or 0).lower()})") from None


def _as_json(line: Line) -> dict[str, object]:
    record = line.record
    return {
        "sequence": record.sequence, "event": record.event.name.lower(), "fields": dict(record.fields),
        "time": record.moment.as_text(), "boottime": record.moment.boottime, "boot": record.moment.boot, "digest": line.digest,
    }


def _as_text(line: Line) -> str:
    record = line.record
    fields = "  ".join(f"{name} {value}" for name, value in record.fields.items())
    return f"{record.sequence:>6}  {record.moment.as_text()}  {record.event.name.lower()}  {fields}".rstrip()


def _as_report(report: Report) -> Iterator[str]:
    for checked in report.checked:
        yield f"checked  {checked}"
    for finding in report.findings:
        yield str(finding)
    if report.lines:
        first, last = report.lines[0].record, report.lines[-1].record
        yield f"records {first.sequence} to {last.sequence}, {first.moment.as_text()} to {last.moment.as_text()} by its own clock"
    yield "nothing wrong was found" if report.good else "this is not the chain that was written"
