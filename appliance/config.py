"""Configuration: one TOML file, read once, validated whole.

Every error of a file is reported, not the first one only, and an unknown key is one of them: a misspelt key that is
ignored would leave a limit open that somebody believes to be set. Values on the command line take the place of the
file's. The result is frozen and is passed to whoever needs it; nobody reads the file a second time.

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
    allow_unsealed = false        # true: serve although a way out was found open, with a banner on every page

    [run]
    folder = "/run/darkroom"      # of the control socket; left out, the user's runtime folder
"""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from appliance.errors import BadRequest

LARGEST_FILE: Final = 1 << 20     # bytes
MOST_THREADS: Final = 256
_KEYS: Final = {
    "listen": {"host", "port"},
    "model": {"bundle", "trust"},
    "seal": {"allow_unsealed"},
    "run": {"folder"},
    "limits": {"queue", "memory_for_pictures", "threads"},
}


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
    allow_unsealed: bool            # serve although a way out is open, and say so on every page
    run_folder: Path | None         # of the control socket; None: the user's runtime folder

    @classmethod
    def parse(cls, untrusted: Mapping[str, object]) -> Config:
        """Return the configuration that a parsed TOML document describes. Raises `BadRequest` naming every error."""
        document = _Document(untrusted)
        built_in = built_in_bundle()
        bundle = document.path("model", "bundle", built_in)
        trust = document.paths("model", "trust", None if bundle != built_in else (built_in_key(),))
        config = cls(
            host=document.text("listen", "host", "127.0.0.1"),
            port=document.whole("listen", "port", 8000, 0, 65535),
            bundle=bundle,
            trust=trust,
            queue=document.whole("limits", "queue", 8, 1, 1000),
            memory_for_pictures=document.whole("limits", "memory_for_pictures", 512, 1, 1 << 20) << 20,
            threads=document.whole("limits", "threads", 0, 0, MOST_THREADS) or None,
            allow_unsealed=document.yes_or_no("seal", "allow_unsealed", False),
            run_folder=document.optional_path("run", "folder"),
        )
        if not is_loopback(config.host):
            document.errors.append(
                f"listen.host: {config.host} is not an address of this machine alone; until there is TLS only "
                "127.0.0.1, ::1 and localhost are served"
            )
        if document.errors:
            raise BadRequest("config", "; ".join(document.errors), hint="correct the configuration; nothing was started")
        return config


def read(path: Path) -> dict[str, object]:
    """Return the TOML document at `path`. Raises `BadRequest` when it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise BadRequest("config", f"{path}: larger than {LARGEST_FILE} bytes")
        return tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        fact = (error.strerror or "cannot be read").lower()
        raise BadRequest("config", f"{path}: {fact}", hint="name a file that can be read") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest("config", f"{path}: not valid TOML: {error}") from None


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


class _Document:
    """A TOML document being taken apart; every complaint is collected in `errors`."""

    def __init__(self, untrusted: Mapping[str, object]) -> None:
        self.errors: list[str] = []
        self._tables: dict[str, Mapping[str, object]] = {}
        for name, table in untrusted.items():
            if name not in _KEYS:
                self.errors.append(f"{name}: unknown table (there are {', '.join(sorted(_KEYS))})")
            elif not isinstance(table, Mapping):
                self.errors.append(f"{name}: must be a table")
            else:
                self._tables[name] = table
                self.errors += [
                    f"{name}.{key}: unknown key (there are {', '.join(sorted(_KEYS[name]))})"
                    for key in sorted(set(table) - _KEYS[name])
                ]

    def _get(self, table: str, key: str) -> object | None:
        return self._tables.get(table, {}).get(key)

    def text(self, table: str, key: str, default: str) -> str:
        value = self._get(table, key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            self.errors.append(f"{table}.{key}: must be a text")
            return default
        return value

    def whole(self, table: str, key: str, default: int, low: int, high: int) -> int:
        value = self._get(table, key)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            self.errors.append(f"{table}.{key}: must be a whole number from {low} to {high}")
            return default
        return value

    def yes_or_no(self, table: str, key: str, default: bool) -> bool:
        value = self._get(table, key)
        if value is None:
            return default
        if type(value) is not bool:
            self.errors.append(f"{table}.{key}: must be true or false")
            return default
        return value

    def optional_path(self, table: str, key: str) -> Path | None:
        return None if self._get(table, key) is None else self.path(table, key, Path())

    def path(self, table: str, key: str, default: Path) -> Path:
        return Path(self.text(table, key, str(default)))

    def paths(self, table: str, key: str, default: tuple[Path, ...] | None) -> tuple[Path, ...]:
        value = self._get(table, key)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            self.errors.append(f"{table}.{key}: must list the public keys that a bundle of your own may be signed with")
            return ()
        return tuple(Path(item) for item in value)
