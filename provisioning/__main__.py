"""The `darkroom-provision` command, for the trusted, connected station: keygen, sign, export, train-demo.

Exit codes are the appliance's: 0 done, 1 unexpected, 2 usage or bad request, 3 verification refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from appliance.errors import BadRequest, DarkroomError

if TYPE_CHECKING:
    from provisioning.demo.train import Progress

_DEMO_SOURCE = "trained from nothing by darkroom-provision train-demo, on drawings of Microsoft's Fluent Emoji"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except DarkroomError as error:
        if given.json:
            print(json.dumps({"error": error.reason, "message": str(error), "hint": error.hint}), flush=True)
        _say(str(error))
        if error.hint is not None:
            print(f"                    {error.hint}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted; what was finished is kept, and the same command goes on from there")
        sys.exit(130)       # as a shell reports SIGINT
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom-provision", description="Prepare models for Darkroom, on a trusted station.", allow_abbrev=False,
        epilog="exit codes: 0 done, 1 unexpected, 2 usage or bad request, 3 verification refused",
    )
    parser.add_argument("--version", action="version", version=f"darkroom-provision {version('darkroom')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    keygen = commands.add_parser("keygen", help="make a key pair to sign models with", allow_abbrev=False)
    keygen.add_argument("--out", type=Path, required=True, metavar="KEY.pem", help="the private key; KEY.pub.pem goes beside it")
    keygen.set_defaults(run=_keygen)

    sign = commands.add_parser("sign", help="sign a bundle, every file of it", allow_abbrev=False)
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    sign.add_argument("--key", type=Path, required=True, metavar="KEY.pem", help="the private key")
    sign.set_defaults(run=_sign)

    export = commands.add_parser("export", help="turn a diffusers folder into a bundle", allow_abbrev=False)
    export.add_argument("source", type=Path, metavar="SOURCE", help="a diffusers folder, Stable Diffusion 1.x")
    export.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to make")
    export.add_argument("--licence", type=Path, required=True, metavar="FILE", help="its licence, for the bundle")
    export.add_argument("--source", dest="source_text", required=True, metavar="TEXT", help="where the model came from")
    export.add_argument("--name", help="what to call it (default: the folder's name)")
    export.add_argument("--about", type=Path, metavar="JSON", help="notes, vocabulary, defaults, sizes")
    export.set_defaults(run=_export)

    train = commands.add_parser(
        "train-demo", help="train the built-in model from nothing", allow_abbrev=False,
        description="Train the built-in model from fixed seeds: some hours on two cores. An interrupted training goes on.",
    )
    train.add_argument("--work", type=Path, default=Path("build/train-demo"), metavar="DIR", help="pictures, checkpoints")
    train.add_argument("--out", type=Path, default=Path("build/demo"), metavar="BUNDLE", help="the folder to make")
    train.add_argument("--key", type=Path, metavar="KEY.pem", help="sign the bundle with this private key")
    train.add_argument("--smoke", action="store_true", help="do all of it, tiny, in two minutes; the pictures mean nothing")
    train.set_defaults(run=_train_demo)

    for command in (keygen, sign, export, train):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _keygen(given: argparse.Namespace) -> None:
    from provisioning.sign import keygen

    pair = keygen(given.out)
    _result(
        given, {"private": str(pair.private), "public": str(pair.public), "fingerprint": pair.fingerprint},
        f"{pair.private}: the private key; keep it on this station",
        f"{pair.public}: the public key; the appliance trusts it with --trust (sha256:{pair.fingerprint})",
    )


def _sign(given: argparse.Namespace) -> None:
    from provisioning.sign import sign

    digest = sign(given.bundle, given.key)
    _result(given, {"bundle": str(given.bundle), "digest": digest}, f"{given.bundle}: signed, sha256:{digest}")


def _export(given: argparse.Namespace) -> None:
    # Before torch is imported, which takes seconds: what can be refused at once is.
    if not given.source.is_dir():
        raise BadRequest("source", f"{given.source}: is no folder", hint="name the folder that holds model_index.json")
    from provisioning.export import export

    export(
        given.source, given.out, licence=given.licence, source_text=given.source_text, name=given.name, about=given.about,
        report=_parts(sys.stderr),
    )
    _result(
        given, {"bundle": str(given.out)}, f"{given.out}: exported, not signed yet",
        f"sign it with: darkroom-provision sign {given.out} --key KEY.pem",
    )


def _train_demo(given: argparse.Namespace) -> None:
    if given.out.exists():
        raise BadRequest("train", f"{given.out}: exists", hint="name another folder with --out, or remove this one")
    from provisioning.demo.train import train
    from provisioning.export import export

    trained = train(given.work, given.work / "model", smoke=given.smoke, report=_training(sys.stderr))
    export(
        trained.pipeline, given.out, licence=trained.licence, source_text=_DEMO_SOURCE, name="Darkroom demo", about=trained.known,
        report=_parts(sys.stderr),
    )
    digest = None
    if given.key is not None:
        from provisioning.sign import sign

        digest = sign(given.out, given.key)
    _result(
        given, {"bundle": str(given.out), "digest": digest, "losses": trained.losses},
        *(f"{stage}: the loss fell from {first:.4f} to {last:.4f}" for stage, (first, last) in trained.losses.items()),
        f"{given.out}: {'signed, sha256:' + digest if digest else 'not signed yet: darkroom-provision sign'}",
    )


def _training(terminal: TextIO) -> Callable[[Progress], None]:
    """Return the function that shows a training's progress: one line on a terminal, one for each tenth elsewhere."""
    told: set[tuple[str, int]] = set()

    def show(progress: Progress) -> None:
        left = "" if progress.seconds_left is None else f", about {_spoken(progress.seconds_left)} left in all"
        line = f"{progress.stage} {progress.done} of {progress.total}, loss {progress.loss:.4f}{left}"
        if terminal.isatty():
            terminal.write(f"\r\x1b[K{line}" + ("\n" if progress.done == progress.total else ""))
            terminal.flush()
        elif (tenth := (progress.stage, 10 * progress.done // max(1, progress.total))) not in told:
            told.add(tenth)
            _say(line)

    return show


def _parts(terminal: TextIO) -> Callable[[str, int, int], None]:
    def show(what: str, done: int, total: int) -> None:
        print(f"darkroom-provision: {done} of {total}: {what}", file=terminal, flush=True)

    return show


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _result(given: argparse.Namespace, found: dict[str, object], *sentences: str) -> None:
    if given.json:
        print(json.dumps(found))
    else:
        for sentence in sentences:
            print(sentence)


def _say(sentence: str) -> None:
    print(f"darkroom-provision: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
