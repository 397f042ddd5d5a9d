"""Everything that serve would refuse, found before it is started and all at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.checking import check
from appliance.errors import BadRequest, VerificationRefused
from tests.bundles import Signed, signed_bundle


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return signed_bundle(tmp_path)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def configuration(signed: Signed, more: str = "", *, key: str = "key.pub.pem", port: int = 0) -> Path:
    """Write a configuration for a signed bundle beside it."""
    path = signed.folder.parent / "darkroom.toml"
    path.write_text(
        f"[listen]\nport = {port}\n[model]\nbundle = '{signed.folder}'\ntrust = ['{signed.folder.parent / key}']\n{more}"
    )
    return path


def test_what_is_in_order_is_said_thing_by_thing(signed: Signed) -> None:
    path = configuration(signed)
    before = sorted(signed.folder.parent.rglob("*"))
    valid, model, address = check(path, {}, {})
    assert valid == "darkroom.toml: the configuration is valid"
    assert model.startswith("Vector: verified, 7 files, digest sha256:")
    assert model.endswith(f"signed with the key sha256:{signed.trusted.fingerprint}")
    assert address == "127.0.0.1, any free port: can be listened on"
    assert sorted(signed.folder.parent.rglob("*")) == before


def test_everything_that_is_wrong_is_said_at_once(signed: Signed, taken: int) -> None:
    (signed.folder / "LICENSE").write_text("altered")
    with pytest.raises(BadRequest) as refused:
        check(configuration(signed, "[limits]\nqueue = 0\n", port=taken), {}, {})
    lines = str(refused.value).split("\n")
    assert lines[0] == "darkroom.toml, line 7: limits.queue must be a whole number from 1 to 1000, not 0"
    assert lines[1].startswith("darkroom.toml, line 4: model.bundle: LICENSE: digest mismatch")
    assert lines[2].startswith(f"darkroom.toml, line 2: listen.port: 127.0.0.1 port {taken} cannot be listened on")
    assert len(lines) == 3
    assert refused.value.exit_code == 2
    assert "copy the bundle again" in str(refused.value.hint)
    assert "--port" in str(refused.value.hint)


def test_a_bundle_alone_that_is_refused_ends_as_a_refused_verification(signed: Signed) -> None:
    (signed.folder / "unet" / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(VerificationRefused, match=r"^darkroom\.toml, line 4: model\.bundle: unet/weights\.bin: digest") as refused:
        check(configuration(signed), {}, {})
    assert (refused.value.exit_code, refused.value.reason) == (3, "digest")


def test_a_key_that_is_missing_is_said_and_the_signature_is_not_judged_without_it(signed: Signed) -> None:
    with pytest.raises(BadRequest) as refused:
        check(configuration(signed, key="missing.pub.pem"), {}, {})
    assert str(refused.value) == (
        "darkroom.toml, line 5: model.trust: missing.pub.pem: the key cannot be read (no such file or directory)"
    )


def test_a_private_key_and_a_missing_bundle_are_both_said(signed: Signed) -> None:
    path = configuration(signed, key="key.pem")
    with pytest.raises(BadRequest) as refused:
        check(path, {"model": {"bundle": str(signed.folder / "nowhere")}}, {})
    key, bundle = str(refused.value).split("\n")
    assert key.startswith("darkroom.toml, line 5: model.trust: key.pem: cannot be trusted")
    assert bundle == "--model: the model folder cannot be opened (no such file or directory)"


def test_a_setting_that_is_wrong_is_not_looked_at_again(signed: Signed, taken: int) -> None:
    path = signed.folder.parent / "darkroom.toml"
    path.write_text(f"[listen]\nport = {taken}\nhost = '0.0.0.0'\n[model]\nbundle = 3\n")
    with pytest.raises(BadRequest) as refused:
        check(path, {}, {})
    assert [line.split(":")[0] for line in str(refused.value).split("\n")] == ["darkroom.toml, line 3", "darkroom.toml, line 5"]


def test_a_socket_that_systemd_passes_is_not_bound_a_second_time(signed: Signed, taken: int) -> None:
    assert check(configuration(signed, port=taken), {}, {"LISTEN_FDS": "1"})[-1] == "the listening socket is systemd's"


def test_a_port_that_was_checked_is_free_again(signed: Signed, taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check(configuration(signed, port=taken), {"listen": {"port": port}}, {})
    with socket.create_server(("127.0.0.1", port)):
        pass
