"""Configuration: one TOML file, read once, validated whole.

Every error of a file is reported, not the first one only, each with its line, and an unknown key is one of them: a misspelt
key that is ignored would leave a limit open that somebody believes to be set. Values on the command line take the place of
the file's and are named as the options they are; the file's are checked nevertheless. The result is frozen and is passed to
whoever needs it; nobody reads the file a second time, and nothing here looks at the environment or at other files.

    [listen]
    host = "127.0.0.1"
    port = 8000

    [model]
    bundle = "/srv/models/demo"
    trust = ["/etc/darkroom/station.pub.pem"]

    [limits]
    queue = 8
    memory_for_pictures = 512     # MiB
    threads = 2                   # of the engine; left out, ONNX Runtime takes one for each core

    [seal]
    allow_unsealed = false        # true: serve although a way out is open, and say so on every page

    [run]
    folder = "/run/darkroom"      # of the control socket; left out, $XDG_RUNTIME_DIR/darkroom or /run/darkroom
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple, TypeGuard, TypeVar

from appliance.errors import BadRequest
from appliance.toml_lines import KeyPath, Lines, locate

LARGEST_FILE: Final = 1 << 16     # bytes; a complete configuration has some thirty lines
MOST_THREADS: Final = 256
LONGEST_FOLDER: Final = 80        # bytes: a UNIX socket's path has 107 (unix(7)), and PID and name come below the folder
SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "listen": ("host", "port"),
    "model": ("bundle", "trust"),
    "limits": ("queue", "memory_for_pictures", "threads"),
    "seal": ("allow_unsealed",),
    "run": ("folder",),
}
_OPTIONS: Final[Mapping[str, str]] = {
    "listen.host": "--host", "listen.port": "--port", "model.bundle": "--model", "model.trust": "--trust",
    "seal.allow_unsealed": "--allow-unsealed",
}
_SYNTAX: Final = re.compile(r"(?P<fact>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL)

_Value = TypeVar("_Value")


class Written(dict[str, object]):
    """A TOML document that was read from a file, with the name of the file and the lines of what is in it."""

    def __init__(self, document: Mapping[str, object], name: str, lines: Mapping[KeyPath, Lines]) -> None:
        super().__init__(document)
        self.name = name
        self.lines = lines


class Complaint(NamedTuple):
    """What is wrong with one setting, as a sentence that names its place."""

    setting: str        # "limits.queue"; a table's name for a table
    sentence: str
    hint: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything that can be set, with the values that hold when nothing is."""

    host: str
    port: int                       # 0: any free one
    bundle: Path
    trust: tuple[Path, ...]         # pinned public keys; a bundle is accepted from no other
    queue: int                      # jobs that may wait
    memory_for_pictures: int        # bytes
    threads: int | None             # of the engine
    allow_unsealed: bool = False    # serve although a way out is open, and say so on every page
    run_folder: Path | None = None  # of the control socket; None: the user's runtime folder

    @classmethod
    def parse(
        cls, untrusted: Mapping[str, object], options: Mapping[str, Mapping[str, object]] | None = None
    ) -> Config:
        """Return the configuration that a parsed TOML document describes, `options` taking the place of its values.

        `options` has the document's shape; what is None was not given. Raises `BadRequest` naming every error, a line each.
        """
        config, complaints = examine(untrusted, options)
        if complaints:
            hints = dict.fromkeys(complaint.hint for complaint in complaints if complaint.hint)
            raise BadRequest(
                "config", "\n".join(complaint.sentence for complaint in complaints),
                hint="; ".join(hints) or "correct the configuration; nothing was started",
            )
        return config


def examine(
    untrusted: Mapping[str, object], options: Mapping[str, Mapping[str, object]] | None = None
) -> tuple[Config, list[Complaint]]:
    """Return a document's configuration and what is wrong with it, in the order of its lines.

    A setting that is complained of has its default in the configuration, which serves nothing but further checks.
    """
    document = _Document(untrusted, options or {})
    bundle = document.path("model", "bundle")
    trust = document.paths("model", "trust")
    if trust is None and bundle in (None, built_in_bundle()):
        trust = (built_in_key(),)
    if trust is None and not document.complained("model"):
        document.complain(
            "model", "trust", "must list the public keys that a bundle of your own may be signed with",
            at=("model", "bundle"), hint="list the public key of the bundle's maker in model.trust, or name it with --trust",
        )
    config = Config(
        host=document.host("listen", "host", "127.0.0.1"),
        port=document.whole("listen", "port", 8000, 0, 65535),
        bundle=bundle or built_in_bundle(),
        trust=trust or (),
        queue=document.whole("limits", "queue", 8, 1, 1000),
        memory_for_pictures=document.whole("limits", "memory_for_pictures", 512, 1, 1 << 20) << 20,
        threads=document.whole("limits", "threads", 0, 0, MOST_THREADS) or None,
        allow_unsealed=document.flag("seal", "allow_unsealed", default=False),
        run_folder=document.path("run", "folder", LONGEST_FOLDER),
    )
    return config, document.complaints()


def read(path: Path) -> Written:
    """Return the TOML document at `path` with the lines of what is in it. Raises `BadRequest` when it cannot be read."""
    name = _shown(path.name)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:      # ValueError: a path with a NUL in it
        fact = (error.strerror or "").lower() if isinstance(error, OSError) else "not a usable path"
        raise BadRequest("config", f"{_shown(str(path))}: {fact}", hint="name a file that can be read") from None
    if len(raw) > LARGEST_FILE:
        raise BadRequest("config", f"{name}: larger than {LARGEST_FILE} bytes", hint="name a configuration, a TOML file")
    try:
        text = raw.decode("utf-8")
        return Written(tomllib.loads(text), name, locate(text))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = len(raw[raw.rfind(b"\n", 0, error.start) + 1:error.start].decode("utf-8")) + 1
        raise _not_toml(f"{name}, line {line}, column {column}", "not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        said = _SYNTAX.fullmatch(str(error))
        fact = said["fact"] if said else str(error)
        fact = fact[:1].lower() + fact[1:]
        if said and said["line"]:
            raise _not_toml(f"{name}, line {said['line']}, column {said['column']}", fact) from None
        raise _not_toml(f"{name}, line {text.count(chr(10)) + 1}, at the end of the file", fact) from None
    except RecursionError:
        raise _not_toml(name, "nested too deeply") from None
    except ValueError:      # a decimal number of thousands of digits, which Python does not convert
        raise _not_toml(name, "a number has too many digits") from None


def _not_toml(place: str, fact: str) -> BadRequest:
    return BadRequest("config", f"{place}: not valid TOML: {fact}", hint="correct the file; nothing was started")


def built_in_bundle() -> Path:
    """Return the folder of the model that ships with Darkroom."""
    return Path(str(resources.files("appliance"))) / "bundles" / "demo"


def built_in_key() -> Path:
    """Return the public key that the built-in model is signed with."""
    return Path(str(resources.files("appliance"))) / "bundles" / "demo.pub.pem"


def is_loopback(host: str) -> bool:
    """Say whether `host` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def place(
    untrusted: Mapping[str, object], options: Mapping[str, Mapping[str, object]], table: str, key: str
) -> str:
    """Return where a setting has its value from: "--port", "darkroom.toml, line 3: listen.port" or "listen.port"."""
    setting = f"{table}.{key}"
    if options.get(table, {}).get(key) is not None:
        return _OPTIONS.get(setting, setting)
    return _in_file(untrusted, (table, key)) + setting


def _in_file(untrusted: Mapping[str, object], at: KeyPath) -> str:
    if not isinstance(untrusted, Written):
        return ""
    inner: object = untrusted
    for name in at:
        if not isinstance(inner, Mapping) or name not in inner:
            return ""
        inner = inner[name]
    lines = untrusted.lines.get(at)
    if lines is None:
        return f"{untrusted.name}: "
    return f"{untrusted.name}, " + (f"line {lines[0]}: " if lines[0] == lines[1] else f"lines {lines[0]} to {lines[1]}: ")


class _Document:
    """A TOML document and the options beside it, being taken apart; every complaint is kept with the place it is sorted by."""

    def __init__(self, untrusted: Mapping[str, object], options: Mapping[str, Mapping[str, object]]) -> None:
        self._untrusted = untrusted
        self._options = options
        self._complaints: list[tuple[int, Complaint]] = []
        self._tables: dict[str, Mapping[str, object]] = {}
        for name, table in untrusted.items():
            if name not in SETTINGS:
                self._complain_of_table(name, table)
            elif not isinstance(table, Mapping):
                self._complain((name,), f"{name} must be a table, written [{name}]", name)
            else:
                self._tables[name] = table
                for key in table:
                    if key not in SETTINGS[name]:
                        self._complain((name, key), f"{name}.{_key(key)} is an unknown key{_meant(name, key)}", name)

    def complaints(self) -> list[Complaint]:
        return [complaint for _, complaint in sorted(self._complaints, key=lambda placed: placed[0])]

    def complained(self, table: str) -> bool:
        return any(complaint.setting.split(".")[0] == table for _, complaint in self._complaints)

    def complain(self, table: str, key: str, fact: str, *, at: KeyPath | None = None, hint: str | None = None) -> None:
        """Complain of a setting, at the option that gives `at` if there is one and at the line of it otherwise."""
        at = at or (table, key)
        setting = f"{table}.{key}"
        if self._option(*at) is not None:
            where = place(self._untrusted, self._options, *at)
            sentence = f"{where} {fact}" if at == (table, key) else f"{where}: {setting} {fact}"
            self._complaints.append((LARGEST_FILE, Complaint(setting, sentence, hint)))
        else:
            self._complain(at, f"{setting} {fact}", setting, hint)

    def host(self, table: str, key: str, default: str) -> str:
        def fits(value: object) -> TypeGuard[str]:
            return isinstance(value, str) and is_loopback(value)

        return self._value(
            table, key, default, fits,
            "must be an address that this machine alone can reach (127.0.0.1, ::1 or localhost) until there is TLS",
        )

    def whole(self, table: str, key: str, default: int, low: int, high: int) -> int:
        def fits(value: object) -> TypeGuard[int]:
            return type(value) is int and low <= value <= high

        return self._value(table, key, default, fits, f"must be a whole number from {low} to {high}")

    def flag(self, table: str, key: str, *, default: bool) -> bool:
        def fits(value: object) -> TypeGuard[bool]:
            return isinstance(value, bool)

        return self._value(table, key, default, fits, "must be true or false")

    def path(self, table: str, key: str, most: int | None = None) -> Path | None:
        def fits(value: object) -> TypeGuard[str]:
            return _is_path(value) and (most is None or len(os.fsencode(value)) <= most)

        limit = "" if most is None else f" of at most {most} bytes"
        given = self._value(table, key, "", fits, f"must be a path{limit}, in quotation marks")
        return Path(given) if given else None

    def paths(self, table: str, key: str) -> tuple[Path, ...] | None:
        def fits(value: object) -> TypeGuard[list[str]]:
            return isinstance(value, list) and bool(value) and all(_is_path(item) for item in value)

        given = self._value(
            table, key, [], fits, "must list the paths of the public keys that a bundle may be signed with, one at least"
        )
        return tuple(Path(item) for item in given) or None

    def _value(self, table: str, key: str, default: _Value, fits: Callable[[object], TypeGuard[_Value]], must: str) -> _Value:
        """Return the option, or what the file says, or the default; complain of each that does not fit."""
        chosen = default
        written = self._tables.get(table, {}).get(key)
        if written is not None:
            if fits(written):
                chosen = written
            else:
                self._complain((table, key), f"{table}.{key} {must}, not {_said(written)}", f"{table}.{key}")
        option = self._option(table, key)
        if option is not None:
            if fits(option):
                chosen = option
            else:
                # Texts from the command line are not repeated: a prompt that was put there goes to no log.
                self.complain(table, key, must if isinstance(option, str | list) else f"{must}, not {_said(option)}")
        return chosen

    def _option(self, table: str, key: str) -> object | None:
        return self._options.get(table, {}).get(key)

    def _complain_of_table(self, name: str, table: object) -> None:
        if isinstance(table, Mapping):
            near = get_close_matches(name, SETTINGS, 1)
            meant = f"; did you mean [{near[0]}]?" if near else f" (there are {', '.join(SETTINGS)})"
            self._complain((name,), f"{_key(name)} is an unknown table{meant}", _key(name))
        else:
            self._complain((name,), f"{_key(name)} stands in no table{_meant('', name)}", _key(name))

    def _complain(self, at: KeyPath, sentence: str, setting: str, hint: str | None = None) -> None:
        """Complain of something in the document, with its line where that is certain."""
        line = self._untrusted.lines.get(at, (0, 0))[0] if isinstance(self._untrusted, Written) else 0
        self._complaints.append((line, Complaint(setting, _in_file(self._untrusted, at) + sentence, hint)))


def _is_path(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _meant(table: str, key: str) -> str:
    """Return the end of a complaint of an unknown key: where it belongs, what is near, or what there is."""
    homes = [name for name, keys in SETTINGS.items() if key in keys and name != table]
    if homes:
        return f"; {key} belongs in [{homes[0]}]"
    near = get_close_matches(key, SETTINGS.get(table, ()), 1)
    if near:
        return f"; did you mean {table}.{near[0]}?"
    everywhere = {name: home for home, keys in SETTINGS.items() for name in keys}
    near = get_close_matches(key, everywhere, 1)
    if near:
        return f"; did you mean {near[0]} in [{everywhere[near[0]]}]?"
    return f" (there are {', '.join(SETTINGS.get(table, SETTINGS))})"


def _said(value: object) -> str:
    """Return words for a wrong value, short and on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:60] + "…", ensure_ascii=not value.isprintable())
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**15):
        return str(value)
    kinds: tuple[tuple[type, str], ...] = ((int, "a number of that size"), (list, "such a list"), (dict, "a table"))
    return next((words for kind, words in kinds if isinstance(value, kind)), "a date or a time")


def _key(key: str) -> str:
    """Return a key as TOML writes it; one of strange characters cannot break the line or write to a terminal."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) else json.dumps(key[:60])


def _shown(name: str) -> str:
    """Return a file's name or path for a message, in which it stays on its line."""
    return name if name.isprintable() else json.dumps(name)
