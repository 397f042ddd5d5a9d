"""Makers of small good bundles, and of bundles signed over anything at all, for the tests of trust.

The ONNX graphs are written by a protobuf encoder of this file's own, so that reader and writer share no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.trust.description import (
    Components,
    Defaults,
    LatentSpace,
    ModelDescription,
    NoiseSchedule,
    Sizes,
    TextEncoding,
    Vocabulary,
)
from appliance.trust.key import TrustedKey, digest_for
from appliance.trust.manifest import Envelope, Manifest, pre_authentication_encoding
from provisioning.sign import keygen, sign

VECTORS: Final = Path(__file__).parent / "vectors" / "bundles"

DESCRIPTION: Final = ModelDescription(
    name="Vector",
    family="sd1",
    components=Components(
        "tokenizer/tokenizer.json", "text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/model.onnx", None
    ),
    text=TextEncoding(77, 32, 0, 1, 1),
    latents=LatentSpace(4, 8, 0.18215, ((0.1, 0.2, 0.3),) * 5),
    schedule=NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear", "epsilon", "leading", 1, False, False),
    sizes=Sizes((64, 64), 8, 64, 64, 4096, 4),
    defaults=Defaults("ddim", 20, 2.0, ""),
    variant="fp32",
    licence="CC0-1.0",
    source="made by tests/bundles.py",
    notes="",
    vocabulary=Vocabulary(("apple",), ("red",), ("a red apple",)),
)


def varint(value: int) -> bytes:
    """Encode a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """Encode one protobuf field: an int as varint, anything else as bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(
    name: str, *, raw: bytes | None = None, external: dict[str, str] | None = None, location: int | None = None
) -> bytes:
    """Encode a float32 TensorProto, its data inside or named by `external`."""
    out = field(1, 1) + field(2, 1) + field(8, name)
    if raw is not None:
        out += field(9, raw)
    for key, value in (external or {}).items():
        out += field(13, field(1, key) + field(2, value))
    if location is None and external is not None:
        location = 1
    return out + (field(14, location) if location is not None else b"")


def node(operator: str = "Identity", domain: str = "", *attributes: bytes) -> bytes:
    """Encode a NodeProto."""
    out = field(1, "x") + field(2, "y") + field(4, operator) + (field(7, domain) if domain else b"")
    return out + b"".join(field(5, attribute) for attribute in attributes)


def graph(nodes: list[bytes] | None = None, initializers: list[bytes] | None = None, more: bytes = b"") -> bytes:
    """Encode a GraphProto."""
    out = b"".join(field(1, item) for item in ([node()] if nodes is None else nodes)) + field(2, "g")
    return out + b"".join(field(5, item) for item in initializers or []) + more


def model(inner: bytes | None = None, more: bytes = b"") -> bytes:
    """Encode a ModelProto."""
    return field(1, 10) + field(2, "tests") + field(7, graph() if inner is None else inner) + field(8, field(2, 18)) + more


EXTERNAL: Final = {"location": "weights.bin", "offset": "4", "length": "4"}


def good_files() -> dict[str, bytes]:
    """Return the files of a good bundle, its UNet with weights in a file beside it."""
    return {
        "LICENSE": b"Everything here is in the public domain (CC0-1.0).\n",
        "model.json": DESCRIPTION.to_json(),
        "text_encoder/model.onnx": model(),
        "tokenizer/tokenizer.json": b"{}\n",
        "unet/model.onnx": model(graph(initializers=[tensor("w", external=EXTERNAL), tensor("b", raw=bytes(4))])),
        "unet/weights.bin": bytes(range(8)),
        "vae_decoder/model.onnx": model(),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` below `folder`, which is made."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


class Signed(NamedTuple):
    """A signed bundle, and the two halves of the key."""

    folder: Path
    private: Path
    trusted: TrustedKey


def signed_bundle(where: Path) -> Signed:
    """Make a good bundle at `where`/bundle and sign it with a new key."""
    folder = write(where / "bundle", good_files())
    pair = keygen(where / "key.pem")
    sign(folder, pair.private)
    return Signed(folder, pair.private, TrustedKey.load(pair.public))


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Load a test's own private key."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def sign_payload(payload: bytes, key: Path) -> bytes:
    """Return a `model.sig` with a good signature over any payload at all."""
    private = private_key(key)
    signature = private.sign(pre_authentication_encoding(payload), ec.ECDSA(digest_for(private.public_key())))
    return Envelope(TrustedKey.of(private.public_key()).fingerprint, payload, signature).to_json()


def resign(bundle: Signed, change: Callable[[str], str]) -> None:
    """Change the text of the signed statement and sign the result: a hostile or careless holder of a trusted key."""
    signature = bundle.folder / "model.sig"
    payload = Envelope.parse(signature.read_bytes()).payload.decode()
    changed = change(payload)
    assert changed != payload, "the mutation changes nothing"
    signature.write_bytes(sign_payload(changed.encode(), bundle.private))


def sign_files_as_they_are(bundle: Signed) -> None:
    """Sign whatever is in the folder without looking at it, as another program would."""
    paths = [path for path in bundle.folder.rglob("*") if path.is_file() and path.name != "model.sig"]
    digests = {str(path.relative_to(bundle.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (bundle.folder / "model.sig").write_bytes(sign_payload(Manifest("m", digests).to_payload(), bundle.private))


def described(**changes: object) -> bytes:
    """Return a `model.json` with some fields changed."""
    return replace(DESCRIPTION, **changes).to_json()  # type: ignore[arg-type]


def table(name: str) -> list[dict[str, str]]:
    """Read a table of mutations from the vectors."""
    rows: list[dict[str, str]] = json.loads((VECTORS / name).read_text())
    return rows
