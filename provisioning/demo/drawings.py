"""The drawings that the built-in model learns from: fetched from npm at pinned digests, vector pictures drawn with resvg.

    Fluent Emoji 3D, flat     MIT             what the model is trained on
    Noto Emoji                Apache-2.0      seen by the evaluation's classifier only
    Twemoji                   CC BY 4.0       seen by nothing: what the classifier is tested on

Rules, in order:

1. `npm ci` installs exactly what `package-lock.json` beside this file names, and compares each package with its sha512.
2. No package's own scripts run.
3. Nothing is fetched twice: a folder that is complete is used as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from appliance.errors import BadRequest
from provisioning.demo.vocabulary import HERE, Subject

Style = Literal["3d", "flat", "noto", "twemoji"]
_WEBP: Final = Path("@lobehub/fluent-emoji-3d/assets")
_LONGEST: Final = 900       # seconds that npm may take


class Drawings:
    """The drawings in one folder; `path` names one of them."""

    def __init__(self, modules: Path, drawn: Path) -> None:
        self._assets = modules / _WEBP
        self._drawn = drawn
        self._hexcodes: dict[str, str] = json.loads((drawn / "index.json").read_text(encoding="utf-8"))

    def path(self, subject: Subject, style: Style) -> Path:
        """Return where a subject's drawing is, whether or not the set has one."""
        code = self._hexcodes[subject.label]
        if style != "3d":
            return self._drawn / style / f"{code}.png"
        # The sets disagree on whether U+FE0F, "as a picture, please", belongs to a name.
        spellings = [self._assets / f"{name}.webp" for name in (code, code.replace("-fe0f", ""), f"{code}-fe0f")]
        return next((path for path in spellings if path.exists()), spellings[0])

    def training(self, subject: Subject, flat: bool) -> Path:
        """Return the drawing that the model is trained on, as `pictures.make` asks for it."""
        return self.path(subject, "flat" if flat else "3d")


def fetch(subjects: Sequence[Subject], folder: Path) -> Drawings:
    """Fetch the packages into `folder` and draw the vector pictures, where that was not done yet.

    Raises `BadRequest` where node or npm is missing or the packages cannot be had.
    """
    modules, drawn = folder / "node_modules", folder / "drawn"
    done = drawn / "index.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(HERE / name, folder / name)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
        labels = folder / "labels.json"
        labels.write_text(json.dumps([subject.label for subject in subjects]), encoding="utf-8")
        _run(["node", str(HERE / "render.js"), str(modules), str(labels), str(drawn)], folder)
    return Drawings(modules, drawn)


def _run(command: list[str], folder: Path) -> None:
    program = command[0]
    if shutil.which(program) is None:
        raise BadRequest(
            "drawings", f"{program} is not installed",
            hint="the training pictures come from npm packages: install nodejs and npm",
        )
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        raise BadRequest("drawings", f"{program} did not finish in {_LONGEST} seconds", hint="try again") from None
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        raise BadRequest(
            "drawings", f"{program} failed with status {error.returncode} ({lines[0][:200]})",
            hint="this needs the network: try again",
        ) from None
