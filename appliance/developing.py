"""`darkroom generate`: one request, from a verified model to PNG files, in one process.

Nothing is begun before it can be finished: the request is parsed and the place for the pictures is opened first. A picture
is written to a file without a name and linked into place whole, so that an interruption or a full disk leaves either the
picture or what was there before, and never half of one. (Only where a picture takes the place of another has it a second
name for an instant, which a power cut in that instant could leave.)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from appliance.errors import BadRequest
from appliance.request import GenerationRequest
from appliance.trust.verify import TrustedKey, verify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from appliance.engine.pipeline import StepProgress

_LARGEST_LATENTS = 64 << 20     # bytes of an .npy file


@dataclass(frozen=True)
class Made:
    """One picture on disk."""

    path: Path
    seed: int
    variant: str
    digest: str     # hex SHA-256 of the file


def develop(
    *,
    bundle: Path,
    trusted: Sequence[Path],
    fields: Mapping[str, object],
    out: Path,
    latents: Path | None,
    threads: int | None,
    progress: Callable[[StepProgress, int], None] | None,
) -> list[Made]:
    """Make the pictures that `fields` ask for and write them to `out`, or to `out` with each one's seed in its name.

    Raises `VerificationRefused`, `BadRequest` or `EngineError`; no file is left or changed by a picture that was not
    finished.
    """
    model = verify(bundle, [TrustedKey.load(key) for key in trusted])
    request = GenerationRequest.parse(fields, model.description, fresh_seed=secrets.randbelow(2**32))
    seeds = range(request.seed, request.seed + request.count)
    paths = [out if request.count == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}") for seed in seeds]
    for path in paths:
        _check_place(path)
    noise = None if latents is None else _read_latents(latents)

    # After the checks: importing onnxruntime takes longer than all of them.
    from appliance.engine.image import encode_png
    from appliance.engine.pipeline import Pipeline

    def on_step(step: StepProgress) -> None:
        if progress is not None:
            progress(step, request.count)

    made = []
    pipeline = Pipeline(model, threads=threads)
    pictures = pipeline.generate(request, on_step=on_step, cancelled=lambda: False, latents=noise)
    for path, picture in zip(paths, pictures, strict=True):
        png = encode_png(picture.pixels)
        write_whole(path, png)
        made.append(Made(path, picture.seed, picture.variant, hashlib.sha256(png).hexdigest()))
    return made


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises `BadRequest`."""
    try:
        with _nameless(path.parent) as descriptor:
            with io.FileIO(descriptor, "w", closefd=False) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
            os.fsync(descriptor)
            source = f"/proc/self/fd/{descriptor}"
            # (src_dir_fd changes nothing for an absolute path, but without it Python calls link(2), which follows no link.)
            with contextlib.suppress(FileExistsError):
                os.link(source, path, src_dir_fd=descriptor, follow_symlinks=True)
                return
            # linkat(2) takes no name that exists: a second name first, then renamed over the old file in one step.
            beside = path.with_name(f".{secrets.token_hex(8)}.darkroom")
            try:
                os.link(source, beside, src_dir_fd=descriptor, follow_symlinks=True)
                beside.replace(path)
            except BaseException:       # an interruption too
                beside.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from None


@contextmanager
def _nameless(folder: Path) -> Iterator[int]:
    """Open a file that has no name and is gone when it is closed (open(2), O_TMPFILE)."""
    descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_place(out: Path) -> None:
    """Find out that `out` cannot be written before a picture was made for it. Raises `BadRequest`."""
    try:
        if out.is_dir():
            raise BadRequest("out", f"{out}: is a folder", hint="name a file, for example --out picture.png")
        if out.suffix.lower() != ".png":
            raise BadRequest("out", f"{out}: pictures are written as PNG", hint="let the name end in .png")
        with _nameless(out.parent):
            pass
    except OSError as error:
        raise _cannot_write(out, error) from None


def _cannot_write(path: Path, error: OSError) -> BadRequest:
    return BadRequest(
        "out", f"{path}: cannot be written: {(error.strerror or 'unknown').lower()}",
        hint="choose a folder on this machine's disk that you may write to and that has room",
    )


def _read_latents(path: Path) -> NDArray[np.float32]:
    """Return Gaussian noise from an .npy file, (1, channels, height / 8, width / 8) float32. Raises `BadRequest`."""
    import numpy as np

    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_LATENTS + 1)
    except OSError as error:
        raise BadRequest("latents", f"{path}: {(error.strerror or 'unknown').lower()}") from None
    if len(raw) > _LARGEST_LATENTS:
        raise BadRequest("latents", f"{path}: larger than {_LARGEST_LATENTS} bytes")
    npy = io.BytesIO(raw)
    try:
        # The header alone first, and never as pickle: an .npy of objects would be code, and one may claim any size.
        version = np.lib.format.read_magic(npy)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](npy)
    except (ValueError, KeyError, EOFError, SyntaxError):
        raise BadRequest("latents", f"{path}: not an .npy file of numbers", hint="save it with numpy.save, as float32") from None
    if dtype != np.float32:
        raise BadRequest("latents", f"{path}: holds {dtype}, and float32 is needed", hint="noise.astype('float32')")
    content = raw[npy.tell() :]
    if math.prod(shape) * dtype.itemsize != len(content):
        raise BadRequest("latents", f"{path}: its size is not what its header says", hint="save it anew with numpy.save")
    return np.frombuffer(content, np.float32).reshape(shape, order="F" if fortran else "C").copy()


def bar(terminal: TextIO) -> Callable[[StepProgress, int], None]:
    """Return the function that draws progress on one line of a terminal."""
    started = time.monotonic()

    def draw(step: StepProgress, count: int) -> None:
        done, total = step.image_index * step.steps + step.step, count * step.steps
        left = (time.monotonic() - started) * (total - done) / done
        filled = 24 * done // total
        which = f"picture {step.image_index + 1} of {count}, " if count > 1 else ""
        with contextlib.suppress(OSError):
            terminal.write(
                f"\r{'█' * filled}{'░' * (24 - filled)}  {which}step {step.step} of {step.steps}, about {left:.0f} s left  "
            )
            if done == total:
                terminal.write("\r\x1b[K")
            terminal.flush()

    return draw
