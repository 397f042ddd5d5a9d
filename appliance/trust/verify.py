"""Which models may be loaded: `verify` is the only maker of `VerifiedModel`, and the engine takes nothing else.

The steps, numbered alike in the code:

 1. There is at least one pinned key.
 2. The folder is opened once; everything in it is a regular file with one name, or a folder, plainly named, within limits.
    Names, kinds and sizes are looked at; no content is read.
 3. `model.sig` is read and has the one accepted form.
 4. Its hint is the fingerprint of a pinned key.
 5. That key made the signature. Until here the payload is bytes that nobody parses.
 6. The payload is an OMS v1.0 statement about files, with one digest over them all.
 7. The files in the folder are the files listed: none missing, none more.
 8. Each file is read once into one buffer, and that buffer's SHA-256 is the listed one.
 9. Only now is content looked at: `model.json`, `LICENSE`, and the graphs, which lead nowhere outside the bundle.

The bytes that were hashed are the bytes that are handed out: `VerifiedModel` holds them and goes back to no file. They are
held once, so a bundle takes its own size in memory; whoever has loaded it lets go of the `VerifiedModel` to give that back.

The folder may be renamed or moved: the name in the signature is shown and not enforced. The bundle's path itself may be a
link (that is how installations switch between versions); whatever it led to when it was opened is what is verified.

    model = verify(Path("bundles/demo"), [TrustedKey.load(Path("release.pub.pem"))])
    session = InferenceSession(model.content(model.description.components.unet))
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from appliance.errors import VerificationRefused
from appliance.trust import folder
from appliance.trust.description import PLACE as DESCRIPTION
from appliance.trust.description import ModelDescription
from appliance.trust.folder import Limits
from appliance.trust.key import TrustedKey
from appliance.trust.manifest import SIGNATURE, Envelope, Manifest
from appliance.trust.onnx_graph import ExternalTensor, external_tensors

__all__ = ["Limits", "TrustedKey", "VerifiedModel", "examine", "verify"]

LICENCE: Final = "LICENSE"
LARGEST_LICENCE: Final = 1 << 20    # bytes
_MADE_HERE: Final = object()        # whoever has it is in this module


class VerifiedModel:
    """A model every byte of which a pinned key signed; made by `verify` alone.

    The constructor wants a token that only this module has. That guards against mistakes, not against hostile code in the
    same process, which could do anything anyway. It cannot be changed, copied or pickled.
    """

    __slots__ = ("_contents", "_manifest", "description", "digest", "digests", "external", "key_fingerprint", "licence_text")

    description: ModelDescription
    digest: str                                             # hex, over all files: what the page shows
    digests: Mapping[str, str]                              # hex SHA-256 by path
    external: Mapping[str, tuple[ExternalTensor, ...]]      # by the path of the graph
    key_fingerprint: str                                    # hex, of the key that signed
    licence_text: str
    _contents: Mapping[str, bytes]
    _manifest: Manifest

    def __init__(
        self,
        made_here: object,
        *,
        manifest: Manifest,
        key: TrustedKey,
        contents: Mapping[str, bytes],
        description: ModelDescription,
        licence_text: str,
        external: Mapping[str, tuple[ExternalTensor, ...]],
    ) -> None:
        if made_here is not _MADE_HERE:
            raise TypeError("a VerifiedModel comes from verify() alone")
        values = {
            "_contents": MappingProxyType(dict(contents)), "_manifest": manifest,
            "description": description, "digest": manifest.root, "digests": MappingProxyType(dict(manifest.digests)),
            "external": MappingProxyType(dict(external)), "key_fingerprint": key.fingerprint, "licence_text": licence_text,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def read(self, path: str) -> memoryview:
        """Return the bytes of the file at `path` that were hashed, read-only and not copied. `KeyError` if not listed."""
        return memoryview(self._contents[path])

    def content(self, path: str) -> bytes:
        """Return the same bytes as `read`, as the object that `InferenceSession` takes without making a copy."""
        return self._contents[path]

    def listing(self) -> str:
        """Return the digests as `sha256sum -c` reads them."""
        return self._manifest.listing()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a VerifiedModel cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a VerifiedModel cannot be changed: {name}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a VerifiedModel cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"<VerifiedModel {self.description.name!r} sha256:{self.digest[:12]}… {len(self.digests)} files>"


def verify(bundle: Path, trusted: Sequence[TrustedKey], limits: Limits | None = None) -> VerifiedModel:
    """Return the model in the folder `bundle` if one of the `trusted` keys signed every file in it, and nothing else is.

    Raises `VerificationRefused` with the file, the fact, what was expected and what was found; `BadRequest` when there is no
    such folder or it is empty. Neither reads on after the first refusal.
    """
    # 1. At least one pinned key.
    if not trusted:
        raise VerificationRefused("no_trusted_key", "trust", "no key is trusted, so no model can be",
                                  hint="name the public key that models are signed with: --trust KEY.pub.pem")
    limits = limits or Limits()
    with folder.opened(bundle) as descriptor:
        # 2. What is there: names, kinds, sizes.
        found = folder.survey(descriptor, limits)
        if SIGNATURE not in found:
            raise VerificationRefused("signature_missing", SIGNATURE, "the bundle is not signed",
                                      hint="get it again from its maker, or sign it with darkroom-provision sign")
        # 3. The one accepted form.
        envelope = Envelope.parse(folder.read_once(descriptor, SIGNATURE, found[SIGNATURE]))
        # 4. A pinned key's hint.
        key = next((key for key in trusted if key.fingerprint == envelope.hint), None)
        if key is None:
            raise VerificationRefused(
                "key_untrusted", SIGNATURE, "signed with a key that is not trusted here",
                expected=" or ".join(f"sha256:{key.fingerprint[:16]}…" for key in trusted), got=f"sha256:{envelope.hint[:16]}…",
                hint="if you trust its maker, add that public key: --trust KEY.pub.pem",
            )
        # 5. That key's signature.
        key.check(envelope)
        # 6. The statement, now that it is known whose it is.
        manifest = Manifest.parse(envelope.payload)
        # 7. The files listed and no others.
        folder.compare(manifest.digests, found)
        # 8. Read once; the digest is of the very bytes that are kept.
        contents: dict[str, bytes] = {}
        for path, expected in manifest.digests.items():
            contents[path] = folder.read_once(descriptor, path, found[path])
            got = hashlib.sha256(contents[path]).hexdigest()
            if got != expected:
                raise VerificationRefused("digest", path, "digest mismatch", expected=f"sha256:{expected}", got=f"sha256:{got}",
                                          hint="the file was damaged or altered: copy the bundle again from its maker")
    # 9. What the bytes say.
    description, licence_text, external = examine(contents)
    return VerifiedModel(
        _MADE_HERE, manifest=manifest, key=key, contents=contents,
        description=description, licence_text=licence_text, external=external,
    )


def examine(contents: Mapping[str, bytes]) -> tuple[ModelDescription, str, dict[str, tuple[ExternalTensor, ...]]]:
    """Return a bundle's description, its licence's text and its graphs' external tensors by graph.

    Both sides call it: `verify` on bytes whose digests were compared, and the signer, so that nothing is signed that would be
    refused. Raises `VerificationRefused`.
    """
    for required in (DESCRIPTION, LICENCE):
        if required not in contents:
            raise VerificationRefused("required_missing", required, "missing", hint="a bundle has a model.json and a LICENSE")
    description = ModelDescription.parse(contents[DESCRIPTION])
    parts = description.components
    graphs = {path for path in (parts.text_encoder, parts.unet, parts.vae_decoder, parts.vae_encoder) if path is not None}
    for path in sorted(graphs | {parts.tokenizer}):
        if path not in contents:
            raise VerificationRefused("component_missing", path, "named in model.json and not in the bundle")
    sizes = {path: len(content) for path, content in contents.items()}
    # A graph that model.json does not name today may be a variant that the engine finds tomorrow.
    graphs |= {path for path in contents if path.endswith(".onnx")}
    external = {path: external_tensors(path, contents[path], sizes) for path in sorted(graphs)}
    return description, _licence(contents[LICENCE]), external


def _licence(content: bytes) -> str:
    fact = f"larger than {LARGEST_LICENCE} bytes"
    if len(content) <= LARGEST_LICENCE:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            fact = "not UTF-8"
        else:
            # Category Z is spaces and line separators; str.isspace would let control characters through.
            if text.strip() and all(c.isprintable() or c in "\t\r\n\f" or unicodedata.category(c)[0] == "Z" for c in text):
                return text
            fact = "empty, or holds control characters"
    raise VerificationRefused("licence", LICENCE, f"not a readable text: {fact}")
