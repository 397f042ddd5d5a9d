"""What `darkroom serve --check` looks at: everything that `serve` would refuse, found before it is started, and all at once.

In order:

1. The file is read and validated whole (`appliance.config`). What is no TOML ends the check: nothing else is known then.
2. Each trusted key can be read and is a key.
3. The bundle can be opened, and a trusted key signed every byte of it (`appliance.trust.verify`). If a key of step 2 could
   not be used, the signature is not judged, since that key might be the one that made it.
4. The address can be listened on; it is let go of at once. Where systemd passes the socket, that is its affair.

A setting that step 1 complains of is not looked at again. A bundle takes its own size in memory while it is verified. Nothing
is written, sealed or started, and whether the machine lets Darkroom seal itself is not known from here: `darkroom status` is.

    for sentence in check(Path("darkroom.toml"), {"listen": {"port": 8080}}, os.environ):
        print(sentence)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from appliance.config import Complaint, Config, examine, place, read
from appliance.errors import BadRequest, DarkroomError, VerificationRefused
from appliance.listening import listen
from appliance.trust import folder
from appliance.trust.verify import TrustedKey, verify


def check(
    path: Path | None, options: Mapping[str, Mapping[str, object]], environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Return a sentence for each thing that was found to be in order; `path` is None where there is no file.

    `options` are those of `Config.parse`. Raises one error with a line for each thing that is not in order: `BadRequest`
    where the configuration is among them, `VerificationRefused` where nothing but the bundle or a key is refused.
    """
    document: Mapping[str, object] = read(path) if path is not None else {}
    config, complaints = examine(document, options)
    spoilt = {complaint.setting.partition(".")[0] for complaint in complaints}
    found = _Found(document, options, complaints)
    if not complaints:
        found.fine.append("the configuration is valid" if path is None else f"{path.name}: the configuration is valid")
    if "model" not in spoilt:
        _check_model(config, found)
    if "listen" not in spoilt:
        _check_address(config, found, environment)
    found.raise_if_any()
    return tuple(found.fine)


class _Found:
    """What has been found so far: in order, and not."""

    def __init__(
        self, document: Mapping[str, object], options: Mapping[str, Mapping[str, object]], complaints: list[Complaint]
    ) -> None:
        self.fine: list[str] = []
        self._document = document
        self._options = options
        self._complaints = complaints
        self._refused: list[tuple[str, DarkroomError]] = []

    def refuse(self, table: str, key: str, error: DarkroomError) -> None:
        """Keep an error that came of the setting `table.key`."""
        self._refused.append((place(self._document, self._options, table, key), error))

    def raise_if_any(self) -> None:
        """Raise one error that says all of them, if there are any."""
        sentences = [complaint.sentence for complaint in self._complaints]
        sentences += [f"{where}: {error}" for where, error in self._refused]
        if not sentences:
            return
        hints = [complaint.hint for complaint in self._complaints] + [error.hint for _, error in self._refused]
        hint = "; ".join(dict.fromkeys(hint for hint in hints if hint)) or "correct the configuration"
        if self._complaints or not all(isinstance(error, VerificationRefused) for _, error in self._refused):
            raise BadRequest("config", "\n".join(sentences), hint=hint)
        where, first = self._refused[0]
        raise VerificationRefused(first.reason, where, "\n".join([str(first), *sentences[1:]]), hint=hint)


def _check_model(config: Config, found: _Found) -> None:
    keys: list[TrustedKey] = []
    for path in config.trust:
        try:
            keys.append(TrustedKey.load(path))
        except DarkroomError as error:
            found.refuse("model", "trust", error)
    try:
        if len(keys) < len(config.trust):
            with folder.opened(config.bundle):
                return
        # What is read here is let go of at once: the engine reads and verifies for itself.
        model = verify(config.bundle, keys)
    except DarkroomError as error:
        found.refuse("model", "bundle", error)
    else:
        found.fine.append(
            f"{model.description.name}: verified, {len(model.digests)} files, digest sha256:{model.digest}, "
            f"signed with the key sha256:{model.key_fingerprint}"
        )


def _check_address(config: Config, found: _Found, environment: Mapping[str, str]) -> None:
    if "LISTEN_FDS" in environment:
        found.fine.append("the listening socket is systemd's")
        return
    try:
        listen(config.host, config.port).close()
    except BadRequest as error:
        found.refuse("listen", "port", error)
    else:
        port = f"port {config.port}" if config.port else "any free port"
        found.fine.append(f"{config.host}, {port}: can be listened on")
