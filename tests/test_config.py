"""One TOML file, read once, every error of it said with its line."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.config import LARGEST_FILE, SETTINGS, Config, built_in_bundle, built_in_key, read
from appliance.errors import BadRequest
from appliance.toml_lines import KeyPath, Lines, locate

GUIDE = Path(__file__).parent.parent / "docs" / "configuration.md"


def refusal(tmp_path: Path, text: str | bytes, options: Mapping[str, Mapping[str, object]] | None = None) -> list[str]:
    """Return the lines of the message with which a file is refused."""
    path = tmp_path / "darkroom.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(BadRequest) as refused:
        Config.parse(read(path), options)
    assert refused.value.hint
    return str(refused.value).split("\n")


def test_nothing_set_serves_the_built_in_model_on_this_machine_alone() -> None:
    config = Config.parse({})
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.bundle == built_in_bundle()
    assert config.trust == (built_in_key(),)
    assert config.allow_unsealed is False
    assert config.run_folder is None


def test_every_error_is_reported_with_its_line_not_only_the_first(tmp_path: Path) -> None:
    said = refusal(tmp_path, """\
port = 3
[listen]
host = "0.0.0.0"
port = 70000
prot = 1
queue = 2

[limts]
a = 1
[limits]
queue = 0
memory_for_pictures = "512"
threads = true
[model]
bundle = "/srv/x"
[seal]
allow_unsealed = 1
[run]
folder = 1979-01-01
""")
    expected = [
        (1, "port stands in no table; port belongs in [listen]"),
        (3, 'listen.host must be an address that this machine alone can reach (127.0.0.1, ::1 or localhost) until there is TLS, not "0.0.0.0"'),
        (4, "listen.port must be a whole number from 0 to 65535, not 70000"),
        (5, "listen.prot is an unknown key; did you mean listen.port?"),
        (6, "listen.queue is an unknown key; queue belongs in [limits]"),
        (8, "limts is an unknown table; did you mean [limits]?"),
        (11, "limits.queue must be a whole number from 1 to 1000, not 0"),
        (12, 'limits.memory_for_pictures must be a whole number from 1 to 1048576, not "512"'),
        (13, "limits.threads must be a whole number from 0 to 256, not true"),
        (15, "model.trust must list the public keys that a bundle of your own may be signed with"),
        (17, "seal.allow_unsealed must be true or false, not 1"),
        (19, "run.folder must be a path of at most 80 bytes, in quotation marks, not a date or a time"),
    ]
    assert said == [f"darkroom.toml, line {line}: {fact}" for line, fact in expected]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[unheard]", "line 1: unheard is an unknown table (there are listen, model, limits, seal, run)"),
        ("listen = 3", "line 1: listen must be a table, written [listen]"),
        ("[[listen]]", "line 1: listen must be a table, written [listen]"),
        ("[limits]\nqeue=1", "line 2: limits.qeue is an unknown key; did you mean limits.queue?"),
        ("[limits]\nprot=1", "line 2: limits.prot is an unknown key; did you mean port in [listen]?"),
        ("[limits]\nzzz=1", "line 2: limits.zzz is an unknown key (there are queue, memory_for_pictures, threads)"),
        ('[limits]\n"a\\nb\\u001b[31m"=1', 'line 2: limits."a\\nb\\u001b[31m" is an unknown key'),
        ("limits.queue = inf", "line 1: limits.queue must be a whole number from 1 to 1000, not inf"),
        (f"limits.queue = 0x{'f' * 5000}", "line 1: limits.queue must be a whole number from 1 to 1000, not a number of that size"),
        ("[model]\ntrust = []", "line 2: model.trust must list the paths"),
        ("[model]\ntrust = [\n 'a',\n 3\n]", "line 2: model.trust must list the paths"),
        ('[model]\nbundle = ""', 'line 2: model.bundle must be a path, in quotation marks, not ""'),
        ('[run]\nfolder = "a\\u0000b"', "line 2: run.folder must be a path"),
        (f"[run]\nfolder = '/{'é' * 40}'", "line 2: run.folder must be a path of at most 80 bytes"),
        ('limits = { queue = 0, threads = 1 }', "line 1: limits.queue must be"),
        ("[limits]\n'queue' = 0", "line 2: limits.queue must be"),
        ('[model]\nbundle = """\nqueue = 3\n[limits]\n"""\ntrust = ["k"]\n[limits]\nqueue = 0', "line 8: limits.queue must be"),
    ],
)
def test_what_is_wrong_is_said_with_what_was_expected(tmp_path: Path, written: str, said: str) -> None:
    for text in (written, written.replace("\n", "\r\n")):
        lines = refusal(tmp_path, text)
        assert len(lines) == 1
        assert lines[0].startswith(f"darkroom.toml, {said}")


def test_a_key_whose_line_is_not_certain_is_sent_to_the_lines_of_its_table(tmp_path: Path) -> None:
    said = refusal(tmp_path, '# one\nlimits = { threads = """\n""", queue = 0 }\n')
    assert [line.partition(" must")[0] for line in said] == [
        "darkroom.toml, lines 2 to 3: limits.queue", "darkroom.toml, lines 2 to 3: limits.threads",
    ]


def test_a_file_that_would_take_long_to_search_is_refused_soon_and_without_a_wrong_line(tmp_path: Path) -> None:
    began = time.monotonic()
    blank = "\n" * (LARGEST_FILE - 100)
    said = refusal(tmp_path, f'[limits]\nqueue = 0\n[listen]\nhost = """{blank}"""\n[seal]\nallow_unsealed = 1\n')
    assert time.monotonic() - began < 20
    assert [line.partition(" must")[0] for line in said] == [
        "darkroom.toml: listen.host", "darkroom.toml: seal.allow_unsealed", "darkroom.toml, line 2: limits.queue",
    ]
    began = time.monotonic()
    refusal(tmp_path, f'"{"=" * (LARGEST_FILE - 100)}" = 1')
    assert time.monotonic() - began < 20


def test_the_command_line_takes_the_place_of_the_file_and_is_named_as_options(tmp_path: Path) -> None:
    path = tmp_path / "darkroom.toml"
    path.write_text("[listen]\nport = 1234\n[limits]\nqueue = 3\n")
    config = Config.parse(read(path), {"listen": {"port": 0, "host": None}, "seal": {"allow_unsealed": True}})
    assert (config.port, config.host, config.queue, config.allow_unsealed) == (0, "127.0.0.1", 3, True)

    said = refusal(tmp_path, "[limits]\nqueue = 0\n", {"listen": {"port": 70000, "host": "a prompt"}, "model": {"bundle": "/srv/x"}})
    assert said == [
        "darkroom.toml, line 2: limits.queue must be a whole number from 1 to 1000, not 0",
        "--model: model.trust must list the public keys that a bundle of your own may be signed with",
        "--host must be an address that this machine alone can reach (127.0.0.1, ::1 or localhost) until there is TLS",
        "--port must be a whole number from 0 to 65535, not 70000",
    ]


def test_the_files_value_is_checked_also_where_an_option_takes_its_place(tmp_path: Path) -> None:
    said = refusal(tmp_path, "[listen]\nport = 70000\n", {"listen": {"port": 80}})
    assert said == ["darkroom.toml, line 2: listen.port must be a whole number from 0 to 65535, not 70000"]


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
    assert Config.parse({"model": {"bundle": "/srv/model"}}, {"model": {"trust": ["k.pem"]}}).trust == (Path("k.pem"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[listen\n", "line 1, column 8: not valid TOML: expected ']' at the end of a table declaration"),
        (b"[limits]\nqueue = 1\nqueue = 2\n", "line 3, column 10: not valid TOML: cannot overwrite a value"),
        (b"[limits]\nqueue = '''\n", "line 3, at the end of the file: not valid TOML: expected"),
        ("# é\n# ü".encode() + b"\xff\n", "line 2, column 4: not valid TOML: not UTF-8"),
    ],
)
def test_a_syntax_error_has_its_line_and_column(tmp_path: Path, content: bytes, said: str) -> None:
    assert refusal(tmp_path, content)[0].startswith(f"darkroom.toml, {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# " + b"x" * LARGEST_FILE, "darkroom.toml: larger than 65536 bytes"),
        (b"a = " + b"[" * 20000, "darkroom.toml: not valid TOML: nested too deeply"),
        (b"a = " + b"9" * 5000, "darkroom.toml: not valid TOML: a number has too many digits"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert refusal(tmp_path, content) == [said]


def test_a_file_that_cannot_be_read_is_named_whole(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"{tmp_path}/missing.toml: no such file")):
        read(tmp_path / "missing.toml")
    with pytest.raises(BadRequest, match="is a directory"):
        read(tmp_path)
    with pytest.raises(BadRequest, match=r'^".*a\\u0000b": not a usable path$'):
        read(tmp_path / "a\0b")


# ── The guide ─────────────────────────────────────────────────────────────────


def test_the_guides_example_is_a_valid_configuration_that_sets_everything(tmp_path: Path) -> None:
    example = GUIDE.read_text().partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "darkroom.toml"
    path.write_text(example)
    document = read(path)
    assert {name: tuple(table) for name, table in tomllib.loads(example).items()} == dict(SETTINGS)
    config = Config.parse(document)
    assert config.threads == 2
    assert config.run_folder == Path("/run/darkroom")


def test_the_guides_table_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| `?([^|`]+)`? \|", GUIDE.read_text(), re.MULTILINE))
    assert set(rows) == {f"{table}.{key}" for table, keys in SETTINGS.items() for key in keys}
    config = Config.parse({})
    stated = {setting: tomllib.loads(f"value = {rows[setting]}")["value"]
              for setting in ("listen.host", "listen.port", "limits.queue", "limits.memory_for_pictures", "seal.allow_unsealed")}
    assert stated == {
        "listen.host": config.host, "listen.port": config.port, "limits.queue": config.queue,
        "limits.memory_for_pictures": config.memory_for_pictures >> 20, "seal.allow_unsealed": config.allow_unsealed,
    }


# ── Lines of documents that nobody wrote ──────────────────────────────────────

# Values as they are written; whatever looks like a key, a header or a comment inside of them is none.
VALUES = st.sampled_from([
    "1", "'# no comment'", '"a = 1"', "[1, 2]", "1979-01-01", "{}", "[]", '"[b]"', "true # c = 1",
    "[ # first\n  'x', # b = 2\n\n  'y = 3',\n]", "[\n[1],\n# [a]\n]", '"""\na = 1\n[b]\n"""', "'''\n\"\"\"\nc = {\n'''",
    '"""x\\\n   b = 2"""', '[{ a = 1 },\n { a = "}" }]', "'''one line'''", '"""\\"""\\""\n"""', "[[[\n'''\n]'''\n]]]",
])
NAMES = st.sampled_from(["a", "b", "queue", "a=b", "[a]", "# x", 'q"t', "a.b", "", "é", "1", "tab\there", "'", "line\nbreak"])


class Pair(NamedTuple):
    """A key as a path below its table, and its value as it is written; or what is in an inline table."""

    path: KeyPath
    value: str | tuple[tuple[str, str], ...]


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, Lines]]:
    """Draw a document and, counted while it is written, the lines of all that is in it."""
    lines: list[str] = []
    expected: dict[KeyPath, Lines] = {}

    def spelled(name: str) -> str:
        ways = [json.dumps(name)]
        if re.fullmatch(r"[A-Za-z0-9_-]+", name):
            ways.append(name)
        if not set(name) & {"'", "\n"}:
            ways.append(f"'{name}'")
        return draw(st.sampled_from(ways))

    def dotted(path: KeyPath) -> str:
        return draw(st.sampled_from([".", " . "])).join(map(spelled, path))

    def write(path: KeyPath, text: str, within: tuple[KeyPath, ...] = ()) -> None:
        first = len(lines) + 1
        lines.extend(text.split("\n"))
        for length in range(1, len(path) + 1):
            expected.setdefault(path[:length], (first, first))
        for one in within:
            expected.setdefault(one, (first, len(lines)))

    tables = draw(st.lists(st.lists(NAMES, min_size=0, max_size=2).map(tuple), max_size=4, unique=True))
    for table in sorted(tables, key=len):
        lines.extend(draw(st.lists(st.sampled_from(["", "# a = 1", "  # [a]", "\t"]), max_size=2)))
        if table:
            write(table, draw(st.sampled_from(["", "  "])) + f"[{dotted(table)}]" + draw(st.sampled_from(["", " # c"])))
        taken: set[str] = set()
        for _ in range(draw(st.integers(0, 4))):
            path = (draw(NAMES), draw(NAMES)) if draw(st.booleans()) else (draw(NAMES),)
            if path[0] in taken or table + path[:1] in tables or any(one[:len(table) + 1] == table + path[:1] for one in tables):
                continue
            taken.add(path[0])
            if draw(st.booleans()):
                write(table + path, f"{dotted(path)}= {draw(VALUES)}")
            else:
                inner = draw(st.dictionaries(NAMES, VALUES.filter(lambda value: "# c" not in value), min_size=1, max_size=3))
                text = ", ".join(f"{spelled(name)} = {value}" for name, value in inner.items())
                write(table + path, f"{dotted(path)} = {{ {text} }}", tuple((*table, *path, name) for name in inner))
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return ending.join(lines) + draw(st.sampled_from(["", ending])), expected


def every_path(table: Mapping[str, object], above: KeyPath = ()) -> set[KeyPath]:
    """Return the path of everything that tomllib found in a document, arrays aside."""
    found = {(*above, name) for name in table}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= every_path(value, (*above, name))
    return found


@settings(max_examples=300, deadline=None)
@given(documents())
def test_every_key_of_any_document_is_found_on_its_line(drawn: tuple[str, dict[KeyPath, Lines]]) -> None:
    text, expected = drawn
    document = tomllib.loads(text)
    found = locate(text)
    assert set(found) == every_path(document)
    assert {path: found[path] for path in expected} == expected


def test_the_lines_of_arrays_of_tables_and_of_tables_in_any_order_are_found() -> None:
    text = "[a.b]\nc = 1\n[a]\nd = 2\n[[e]]\nf = 1\n[[e]]\nf = 2\n"
    assert locate(text) == {
        ("a",): (1, 1), ("a", "b"): (1, 1), ("a", "b", "c"): (2, 2), ("a", "d"): (4, 4), ("e",): (5, 5), ("e", "f"): (6, 6),
    }
