"""The `darkroom` command: serve, status, generate, verify. The only place that ends a process with a code of its own.

Exit codes: 0 done, 1 unexpected, 2 usage or bad request, 3 verification refused, 4 vault, 5 engine, 6 not sealed.

A prompt comes from standard input or a file, never from an argument: arguments show in the list of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from appliance.config import MOST_THREADS, Config, built_in_bundle, built_in_key, read
from appliance.errors import BadRequest, DarkroomError
from appliance.evidence.journal import to_journal
from appliance.request import MOST_GUIDANCE, MOST_STEPS, SAMPLERS, SPACINGS


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except DarkroomError as error:
        _complain(error, as_json=getattr(given, "json", False))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)       # as a shell reports SIGINT
    except BrokenPipeError:
        # Whoever read our output has what they wanted; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:      # noqa: BLE001     # the last resort of a command: nothing is swallowed, it ends with 1
        _confess(error)
        sys.exit(1)
    sys.exit(0)


def _confess(error: BaseException) -> None:
    """Say the type and the place of a defect, and not its text, which may quote what was being worked on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else "an unknown place"
    _say(f"unexpected {type(error).__name__} at {place}; this is a defect of Darkroom")


def _end_with_a_stray_exception(stray: threading.ExceptHookArgs) -> None:
    """End the process for a defect in one of its threads: Python would print its text and go on without the thread."""
    _confess(stray.exc_value or stray.exc_type())
    os._exit(1)


class _Parser(argparse.ArgumentParser):
    """A parser that does not repeat what it was given: a prompt that was put on the command line goes to no log."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        if "unrecognized arguments" in message:
            message = "an argument is not known; a prompt is read from standard input or a file, never from an argument"
        elif "invalid" in message:
            message = message.partition("invalid")[0] + "invalid value or command"
        _say(message)
        self.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="darkroom", description="A sealed room where images are developed.", allow_abbrev=False,
        epilog="exit codes: 0 done, 1 unexpected, 2 usage or bad request, 3 verification refused, 4 vault, 5 engine, "
        "6 not sealed",
    )
    parser.add_argument("--version", action="version", version=f"darkroom {version('darkroom')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="start the appliance on this machine", allow_abbrev=False)
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any free one (default 8000)")
    serve.add_argument("--config", type=Path, metavar="FILE", help="configuration, a TOML file")
    serve.add_argument(
        "--check", action="store_true", help="say what serve would refuse, all at once, and start nothing",
    )
    serve.add_argument(
        "--allow-unsealed", action="store_true", default=None,
        help="serve although a way out was found open; every page says so",
    )
    _model_options(serve)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser(
        "generate", help="make pictures from a prompt on standard input", allow_abbrev=False,
        description="Make pictures from a prompt that is read from standard input or a file.",
    )
    generate.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from FILE, not stdin")
    generate.add_argument("--negative-file", type=Path, metavar="FILE", help="read what to avoid from FILE")
    generate.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture; with --count, one for each seed")
    generate.add_argument("--steps", metavar="N", help=f"denoising steps, 1 to {MOST_STEPS} (default: the model's own)")
    generate.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: the model's own)")
    generate.add_argument("--spacing", metavar="NAME", help=f"of the sigmas: {' or '.join(SPACINGS)}")
    generate.add_argument("--guidance", metavar="SCALE", help=f"guidance scale, 0 to {MOST_GUIDANCE:g}")
    generate.add_argument("--seed", metavar="N", help="seed of the first picture (default: a random one, which is printed)")
    generate.add_argument("--count", metavar="N", help="how many pictures (default 1)")
    generate.add_argument("--size", metavar="WxH", help="in pixels (default: the model's own)")
    generate.add_argument("--latents", type=Path, metavar="NPY", help="start from this Gaussian noise instead of the seed's")
    generate.add_argument("--threads", type=int, metavar="N", help="threads of the engine (default: one for each core)")
    generate.add_argument("--json", action="store_true", help="print what was made as JSON")
    _model_options(generate)
    generate.set_defaults(run=_generate)

    verify = commands.add_parser("verify", help="check that a model is what a trusted key signed", allow_abbrev=False)
    verify.add_argument("bundle", nargs="?", type=Path, help="the model's folder (default: the built-in model)")
    verify.add_argument("--trust", type=Path, action="append", metavar="KEY", help="public key, PEM (again for several)")
    verify.add_argument("--print", action="store_true", dest="listing", help="print the digests as sha256sum -c reads them")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(run=_verify)

    status = commands.add_parser(
        "status", help="say what a running appliance has observed of its seal", allow_abbrev=False,
        description="Ask the running appliance to try every way out anew, and print what it found.",
    )
    status.add_argument(
        "--run-folder", type=Path, metavar="FOLDER", help="the appliance's run folder, where it was configured"
    )
    status.add_argument("--pid", type=int, help="which appliance, where several are running")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    status.set_defaults(run=_status)

    _add_children(commands)
    return parser


def _add_children(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Add what the supervisor starts; not for people, so not in the help."""
    engine = commands.add_parser("engine")
    engine.add_argument("--bundle", type=Path, required=True)
    engine.add_argument("--trust", type=Path, action="append", required=True)
    engine.add_argument("--threads", type=int)
    for name in ("--wire", "--events", "--link", "--supervisor", "--filter"):
        engine.add_argument(name, type=int, required=True)
    engine.add_argument("--ruleset", type=int)
    engine.set_defaults(run=_engine)
    pages = commands.add_parser("pages")
    for name in (
        "--listener", "--events", "--link", "--supervisor", "--queue", "--memory-for-pictures", "--arbiter-filter",
        "--worker-filter",
    ):
        pages.add_argument(name, type=int, required=True)
    pages.add_argument("--arbiter-ruleset", type=int)
    pages.add_argument("--worker-ruleset", type=int)
    pages.add_argument("--host", action="append", required=True)
    pages.set_defaults(run=_pages)


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="BUNDLE", help="the model's folder (default: the built-in model)")
    parser.add_argument("--trust", type=Path, action="append", metavar="KEY", help="public key that BUNDLE is signed with, PEM")


# ── serve ─────────────────────────────────────────────────────────────────────


def _serve(given: argparse.Namespace) -> None:
    from appliance.supervisor import serve

    options = _options(given)
    if given.check:
        from appliance.checking import check

        _check_runtime()
        for sentence in check(given.config, options, os.environ):
            print(sentence)
        return
    config = Config.parse(read(given.config) if given.config is not None else {}, options)
    _check_runtime()
    _say(f"verifying {config.bundle.name} …")
    serve(config, ready=_announce, publish=to_journal(_say))


def _announce(address: str) -> None:
    print(f"Darkroom is open at {address}  (Ctrl+C closes it, and nothing is left)", flush=True)


def _options(given: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return what the command line sets, in the form of the configuration; None was not given."""
    return {
        "listen": {"host": given.host, "port": given.port},
        "seal": {"allow_unsealed": given.allow_unsealed},
        "model": {
            "bundle": None if given.model is None else str(given.model),
            "trust": None if given.trust is None else [str(key) for key in given.trust],
        },
    }


def _check_runtime() -> None:
    """Refuse to start with no ONNX Runtime or with two, which overwrite each other's files. Raises `BadRequest`."""
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(found) == 2:
        raise BadRequest(
            "onnxruntime", "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other",
            hint="pip uninstall onnxruntime onnxruntime-gpu, then install darkroom[cpu] or darkroom[gpu]",
        )
    if not found:
        raise BadRequest("onnxruntime", "ONNX Runtime is not installed", hint="install darkroom[cpu], or darkroom[gpu]")


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


# ── status ────────────────────────────────────────────────────────────────────


def _status(given: argparse.Namespace) -> None:
    from appliance.seal.control import Running, ask, find, run_folder, the_only

    folder = run_folder(given.run_folder, os.environ)
    running = the_only(folder) if given.pid is None else next(
        (one for one in find(folder) if one.pid == given.pid), None
    )
    if not isinstance(running, Running):
        raise BadRequest("pid", f"no appliance with process id {given.pid} is running", hint="leave --pid out to see which are")
    said = ask(running, "status")
    if given.json:
        print(json.dumps(said, indent=1))
        return
    model = said.get("model")
    promises = said.get("promises")
    print("sealed" if said.get("sealed") is True else "NOT SEALED")
    if isinstance(model, dict):
        print(f"model   {model.get('name')}  sha256:{model.get('digest')}")
    print(f"vault   {said.get('vault')}")
    for promise in promises if isinstance(promises, list) else []:
        verdict = "holds" if promise["holds"] else "BROKEN" if promise["essential"] else "missing"
        print(f"\n{verdict:9}{promise['id']:14}{promise['title']}")
        print(f"{'':9}{promise['observed']}")


# ── generate ──────────────────────────────────────────────────────────────────


def _generate(given: argparse.Namespace) -> None:
    from appliance import developing
    from appliance.seal.confine import forbid_core_dumps

    forbid_core_dumps()
    _check_runtime()
    if given.threads is not None and not 1 <= given.threads <= MOST_THREADS:
        raise BadRequest("threads", f"threads must be from 1 to {MOST_THREADS}")
    bundle, keys = _bundle_and_keys(given.model, given.trust)
    made = developing.develop(
        bundle=bundle,
        trusted=keys,
        fields=_fields(given),
        out=given.out,
        latents=given.latents,
        threads=given.threads,
        progress=developing.bar(sys.stderr) if sys.stderr.isatty() else None,
    )
    if given.json:
        print(json.dumps([
            {"path": str(one.path), "seed": one.seed, "variant": one.variant, "sha256": one.digest} for one in made
        ]))
    else:
        for one in made:
            print(f"{one.path}  seed {one.seed}")


def _fields(given: argparse.Namespace) -> dict[str, object]:
    """Return the request's fields as a form would send them."""
    fields: dict[str, object] = {
        "prompt": _text(given.prompt_file, "prompt"),
        "negative_prompt": None if given.negative_file is None else _text(given.negative_file, "negative prompt"),
        "steps": given.steps, "sampler": given.sampler, "spacing": given.spacing, "guidance_scale": given.guidance,
        "seed": given.seed, "count": given.count,
    }
    if given.size is not None:
        width, cross, height = given.size.lower().partition("x")
        if not cross:
            raise BadRequest("size", "the size must be written as width x height", hint="for example --size 512x512")
        fields["width"], fields["height"] = width, height
    return {name: value for name, value in fields.items() if value is not None}


def _text(path: Path | None, what: str) -> str:
    """Return a prompt from a file or from standard input. Raises `BadRequest`, without quoting it."""
    most = 1 << 20
    if path is None and sys.stdin is None:
        raise BadRequest("prompt_file", f"the {what} cannot be read: standard input is closed", hint="use --prompt-file")
    if path is None and sys.stdin.isatty():
        _say(f"type the {what}, then Ctrl+D")
    try:
        if path is None:
            raw = sys.stdin.buffer.read(most + 1)
        else:
            with path.open("rb") as file:
                raw = file.read(most + 1)
    except OSError as error:
        raise BadRequest("prompt_file", f"the {what} could not be read: {(error.strerror or '').lower()}") from None
    if len(raw) > most:
        raise BadRequest("prompt_long", f"the {what} is larger than {most} bytes", hint="shorten it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("prompt_characters", f"the {what} is not valid UTF-8", hint="save it as UTF-8 text") from None


# ── verify ────────────────────────────────────────────────────────────────────


def _verify(given: argparse.Namespace) -> None:
    from appliance.trust.verify import TrustedKey, verify

    bundle, keys = _bundle_and_keys(given.bundle, given.trust)
    model = verify(bundle, [TrustedKey.load(key) for key in keys])
    if given.json:
        print(json.dumps({
            "verified": True, "name": model.description.name, "digest": model.digest, "key": model.key_fingerprint,
            "files": dict(model.digests),
        }, indent=1))
    elif given.listing:
        for path, digest in sorted(model.digests.items()):
            print(f"{digest}  {path}")
    else:
        print(f"{model.description.name}: verified, {len(model.digests)} files")
        print(f"digest  sha256:{model.digest}")
        print(f"key     sha256:{model.key_fingerprint}")


def _bundle_and_keys(bundle: Path | None, keys: list[Path] | None) -> tuple[Path, list[Path]]:
    if bundle is None and keys is None:
        return built_in_bundle(), [built_in_key()]
    if keys is None:
        raise BadRequest(
            "trust", "a model of your own needs the key that it must be signed with", hint="name it with --trust KEY.pub.pem"
        )
    return bundle or built_in_bundle(), keys


# ── The supervisor's children ─────────────────────────────────────────────────


def _engine(given: argparse.Namespace) -> None:
    from appliance.engine.process import Descriptors, run

    threading.excepthook = _end_with_a_stray_exception
    run(
        bundle=given.bundle, trusted=given.trust, threads=given.threads,
        descriptors=Descriptors(given.wire, given.events, given.link, given.filter, given.ruleset),
        supervisor=given.supervisor,
    )


def _pages(given: argparse.Namespace) -> None:
    from appliance.web.server import Descriptors, Limits, serve

    threading.excepthook = _end_with_a_stray_exception
    serve(
        Limits(given.queue, given.memory_for_pictures, tuple(given.host)),
        Descriptors(
            given.listener, given.link, given.events,
            (given.arbiter_filter, given.arbiter_ruleset), (given.worker_filter, given.worker_ruleset),
        ),
        supervisor=given.supervisor,
    )


# ── Words ─────────────────────────────────────────────────────────────────────


def _say(sentence: str) -> None:
    _write(f"darkroom: {sentence}\n")


def _write(line: str) -> None:
    """Write to standard error, or not: a log that cannot be written must not end what it is about.

    Past Python's buffer, which would try again when the process exits, and change its exit code.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            _, writable, _ = select.select([], [sys.stderr], [], 0)
            if not writable:
                return      # a terminal that was stopped, a reader that is busy: nobody waits for them here
            os.write(sys.stderr.fileno(), line.encode("utf-8", "backslashreplace"))


def _complain(error: DarkroomError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error.reason, "message": str(error), "hint": error.hint}), flush=True)
    _say(str(error))
    if error.hint is not None:
        _write(f"          {error.hint}\n")


if __name__ == "__main__":
    main()
