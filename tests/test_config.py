"""One TOML file, read once, every error of it said."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from appliance.config import Config, built_in_bundle, built_in_key, read
from appliance.errors import BadRequest


def test_nothing_set_serves_the_built_in_model_on_this_machine_alone() -> None:
    config = Config.parse({})
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.bundle == built_in_bundle()
    assert config.trust == (built_in_key(),)


def test_every_error_is_reported_not_only_the_first() -> None:
    document = tomllib.loads('[listen]\nhost = "0.0.0.0"\nport = 70000\nprot = 1\n[limits]\nqueue = 0\n[unheard]\nof = 1\n')
    with pytest.raises(BadRequest) as refused:
        Config.parse(document)
    for place in ("listen.host", "listen.port", "listen.prot", "limits.queue", "unheard"):
        assert place in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", "localhost.example.org"])     # noqa: S104
def test_any_address_but_loopback_is_refused_until_there_is_tls(host: str) -> None:
    with pytest.raises(BadRequest, match="until there is TLS"):
        Config.parse({"listen": {"host": host}})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_served(host: str) -> None:
    assert Config.parse({"listen": {"host": host}}).host == host


def test_a_model_of_ones_own_needs_a_key_to_trust() -> None:
    with pytest.raises(BadRequest, match="model.trust"):
        Config.parse({"model": {"bundle": "/srv/model"}})
    assert Config.parse({"model": {"bundle": "/srv/model", "trust": ["k.pem"]}}).trust == (Path("k.pem"),)


@pytest.mark.parametrize(("content", "said"), [(b"[listen\n", "TOML"), (b"\xff", "TOML"), (b"# " + b"x" * (1 << 20), "larger")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "darkroom.toml"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=said):
        read(path)
    with pytest.raises(BadRequest, match="no such file"):
        read(tmp_path / "missing.toml")
