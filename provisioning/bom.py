"""The bill of materials of a bundle: CycloneDX 1.6, of type machine-learning-model, with the digest of every file.

Plain JSON, since the whole document is one page and a library would have to be told all of it anyway; a test holds it to the
published schema. It has no time and no random number in it: the same files give the same document.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Final

from appliance.trust.description import ModelDescription

NAME: Final = "mlbom.cdx.json"
_NAMESPACE: Final = uuid.UUID("c0ffee00-6d6c-5b6f-8d64-6461726b726d")     # ours, for uuid5: any fixed number does


def bill_of_materials(description: ModelDescription, digests: Mapping[str, str], tools: Mapping[str, str]) -> bytes:
    """Return `mlbom.cdx.json` for a bundle: `digests` are hex SHA-256 by path, `tools` are versions by name."""
    files = sorted(digests.items())
    identity = hashlib.sha256("".join(f"{digest}  {path}\n" for path, digest in files).encode()).hexdigest()
    spdx = not description.licence.startswith("LicenseRef-")
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": description.name,
        "version": identity[:12],
        "description": description.notes or "A text-to-image model.",
        "licenses": [{"license": {"id" if spdx else "name": description.licence}}],
        "modelCard": {
            "modelParameters": {
                "task": "text-to-image",
                "architectureFamily": "latent diffusion",
                "modelArchitecture": "Stable Diffusion 1.x",
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "image"}],
            }
        },
        "properties": [
            {"name": "darkroom:source", "value": description.source},
            {"name": "darkroom:variant", "value": description.variant},
            {"name": "darkroom:prediction_type", "value": description.schedule.prediction_type},
        ],
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, identity)}",
        "version": 1,
        "metadata": {
            "component": model,
            "tools": {
                "components": [{"type": "library", "name": name, "version": version} for name, version in sorted(tools.items())]
            },
        },
        "components": [
            {"type": "file", "bom-ref": path, "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for path, digest in files
        ],
        "dependencies": [{"ref": "model", "dependsOn": [path for path, _ in files]}],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
