"""The `darkroom-provision` command: keys, signatures, export and a whole tiny training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.trust.verify import TrustedKey, verify
from tests.bundles import good_files


def provision(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "provisioning", *arguments], capture_output=True, text=True, timeout=600, check=False, cwd=folder,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2",
             "HOME": str(folder)},
    )


def test_a_key_is_made_a_bundle_signed_with_it_and_the_appliance_takes_it(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    for path, content in good_files().items():
        (bundle / path).parent.mkdir(parents=True, exist_ok=True)
        (bundle / path).write_bytes(content)
    assert provision("keygen", "--out", "station.pem", folder=tmp_path).returncode == 0
    assert (tmp_path / "station.pem").stat().st_mode & 0o777 == 0o600
    signed = provision("sign", "bundle", "--key", "station.pem", "--json", folder=tmp_path)
    assert signed.returncode == 0, signed.stderr
    model = verify(bundle, [TrustedKey.load(tmp_path / "station.pub.pem")])
    assert model.digest == json.loads(signed.stdout)["digest"]


def test_an_old_key_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "station.pem").write_text("an old key", encoding="ascii")
    refused = provision("keygen", "--out", "station.pem", folder=tmp_path)
    assert refused.returncode == 2
    assert "never overwritten" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["station.pem"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "nowhere", "--out", "b", "--licence", "l", "--source", "s"),
        ("sign", "nowhere", "--key", "k.pem"),
        ("export", "nowhere", "--out", "b", "--source", "s"),
        ("train-demo", "--out", "."),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused = provision(*arguments, folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_whole_training_runs_tiny_and_a_signed_bundle_comes_out(tmp_path: Path) -> None:
    assert provision("keygen", "--out", "k.pem", folder=tmp_path).returncode == 0
    done = provision("train-demo", "--smoke", "--work", "work", "--out", "demo", "--key", "k.pem", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for stage, (first, last) in result["losses"].items():
        assert last < first, f"the loss of {stage} did not fall"
    assert verify(tmp_path / "demo", [TrustedKey.load(tmp_path / "k.pub.pem")]).digest == result["digest"]
    assert "left" in done.stderr
