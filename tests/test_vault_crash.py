"""Full storage, failing storage and SIGKILL at the writes of a session: the vault is the old or the new one, and loses nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_a_fault_at_any_write_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no compiler for the preloaded faults")
    library = tmp_path / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.vault_faults", tmp_path, library, "3"], capture_output=True, text=True, check=False, timeout=600,
        cwd=HERE.parent, env={**os.environ, "LD_PRELOAD": str(library)},
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    _, points, _, lost = said[-1].split()
    print(said[-1])
    assert int(points) > 150
    assert int(lost) == 0, said
