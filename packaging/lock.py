"""Write requirements/*.lock: every distribution that is installed, with the SHA-256 of each of its files.

`tokenizers` declares a dependency on a hub client, for a function that downloads tokenizers. Darkroom reads a verified
file instead, and an appliance has no use for HTTP clients on its disk: they are left out here, and what is locked is
installed with `--no-deps`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# huggingface-hub and what only it asks for.
LEFT_OUT = frozenset({
    "anyio", "certifi", "filelock", "fsspec", "h11", "hf-xet", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface-hub",
    "idna", "pyyaml", "shellingham", "sniffio", "tqdm", "truststore", "typer", "typing-extensions",
})
HEADER = "# Written by `make lock`. Installed with pip install --require-hashes --no-deps.\n"


def compiled(*extras: str, only: frozenset[str] | None = None) -> str:
    """Return the lock for some extras, in pip's own format."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock"
        subprocess.run(
            [
                sys.executable, "-m", "piptools", "compile", "--quiet", "--strip-extras", "--generate-hashes", "--allow-unsafe",
                "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links",
                *(f"--extra={extra}" for extra in extras), f"--output-file={out}", "pyproject.toml",
            ],
            cwd=ROOT, check=True,
        )
        entries = re.split(r"\n(?=\S)", out.read_text(encoding="utf-8").strip())
    kept = []
    for entry in entries:
        name = entry.split("==")[0].strip()
        if "==" in entry and name not in LEFT_OUT and (only is None or name in only) and (only or name != "setuptools"):
            kept.append(entry)
    return HEADER + "\n".join(kept) + "\n"


if __name__ == "__main__":
    locks = {
        "build": compiled("build", only=frozenset({"setuptools"})),
        "appliance": compiled("cpu"),
        "appliance-gpu": compiled("gpu"),
    }
    for name, text in locks.items():
        (ROOT / "requirements" / f"{name}.lock").write_text(text, encoding="utf-8")
