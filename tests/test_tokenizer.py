"""The tokenizer: chunks and weights as in A1111, and no crash for any tokenizer.json."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from appliance.engine.tokenizer import LARGEST, MOST_TOKENS, Chunk, PromptTokenizer, apply_weights
from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.description import TextEncoding

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_like() -> dict[str, Any]:
    """Return a tokenizer.json as transformers writes it for CLIP, whose only merges make the words of these tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[list[str]] = []
    for word in ("red", "apple", "moon"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = pieces[:2]
            if pair not in merges:
                merges.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": END},
        "added_tokens": [{"id": vocabulary[mark], "content": mark, **flags} for mark in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END, vocabulary[END]], "cls": [START, vocabulary[START]],
                           "trim_offsets": False, "add_prefix_space": False},
        "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }    # fmt: skip


DOCUMENT: Final = clip_like()
IDS: Final[dict[str, int]] = DOCUMENT["model"]["vocab"]
RED, APPLE, MOON, COMMA = (IDS[word + "</w>"] for word in ("red", "apple", "moon", ","))


def encoding(max_length: int = 77, pad: str = END) -> TextEncoding:
    return TextEncoding(max_length=max_length, hidden_size=8, start_id=IDS[START], end_id=IDS[END], pad_id=IDS[pad])


def tokenizer(max_length: int = 77, pad: str = END) -> PromptTokenizer:
    return PromptTokenizer(json.dumps(DOCUMENT).encode(), encoding(max_length, pad))


def inner(chunk: Chunk) -> list[int]:
    """Return the tokens between start and the first end."""
    ids = chunk.ids.tolist()
    assert ids[0] == IDS[START]
    return ids[1:ids.index(IDS[END])]    # type: ignore[no-any-return]


def test_a_short_prompt_is_one_chunk_of_start_tokens_end_and_padding() -> None:
    [chunk] = tokenizer(8, pad="!</w>").encode("Red  (APPLE:1.5)\n")
    pad = IDS["!</w>"]
    assert chunk.ids.tolist() == [IDS[START], RED, APPLE, IDS[END], pad, pad, pad, pad]
    assert chunk.weights.tolist() == [1, 1, 1.5, 1, 1, 1, 1, 1]
    assert chunk.ids.dtype == np.int64
    assert chunk.weights.dtype == np.float32


@pytest.mark.parametrize("prompt", ["", " ", "()"])
def test_an_empty_prompt_is_one_empty_chunk(prompt: str) -> None:
    [chunk] = tokenizer(8).encode(prompt)
    assert chunk.ids.tolist() == [IDS[START]] + [IDS[END]] * 7
    assert tokenizer(8).count(prompt) == 0


@pytest.mark.parametrize("max_length", [8, 32, 77])
def test_a_full_chunk_is_followed_by_another_only_when_a_token_is_left(max_length: int) -> None:
    room = max_length - 2
    assert [inner(chunk) for chunk in tokenizer(max_length).encode("red " * room)] == [[RED] * room]
    assert [inner(chunk) for chunk in tokenizer(max_length).encode("red " * (room + 1))] == [[RED] * room, [RED]]


def test_overflowing_text_goes_on_from_the_last_comma_if_it_is_near() -> None:
    def lengths(prompt: str) -> list[int]:
        return [len(inner(chunk)) for chunk in tokenizer().encode(prompt)]

    # 75 tokens fit; a comma among the last 20 of them is where the next chunk begins.
    assert lengths("red " * 55 + ", " + "moon " * 20) == [56, 20]
    assert lengths("red " * 54 + ", " + "moon " * 21) == [75, 1]
    assert lengths("red " * 60 + ", " + "red " * 5 + ", " + "moon " * 20) == [67, 20]
    assert lengths("red " * 74 + ", " + "moon " * 5) == [75, 5]
    assert lengths("red " * 60 + ", " + "red " * 14 + ", moon") == [75, 2]


def test_the_backtrack_is_shorter_in_a_shorter_chunk() -> None:
    # 30 tokens fit, and 20 of 75 is 8 of 30.
    assert [len(inner(chunk)) for chunk in tokenizer(32).encode("red " * 22 + ", " + "moon " * 8)] == [23, 8]
    assert [len(inner(chunk)) for chunk in tokenizer(32).encode("red " * 21 + ", " + "moon " * 9)] == [30, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["red", "apple", ",", "(moon:1.3)"]), max_size=200), st.sampled_from([8, 32, 77]))
def test_no_token_is_lost_or_reordered_between_chunks(words: list[str], max_length: int) -> None:
    known = {"red": (RED, 1.0), "apple": (APPLE, 1.0), ",": (COMMA, 1.0), "(moon:1.3)": (MOON, np.float32(1.3))}
    chunks = tokenizer(max_length).encode(" ".join(words))
    tokens = [(one, weight) for chunk in chunks for one, weight in zip(inner(chunk), chunk.weights[1:], strict=False)]
    assert tokens == [known[word] for word in words]
    assert tokenizer(max_length).count(" ".join(words)) == len(words)
    assert all(len(chunk.ids) == len(chunk.weights) == max_length for chunk in chunks)


def test_prompt_and_negative_prompt_have_equally_many_chunks() -> None:
    wanted, unwanted = tokenizer(8).pair("red " * 20, "moon")
    assert len(wanted) == len(unwanted) == 4
    assert [inner(chunk) for chunk in unwanted] == [[MOON], [], [], []]
    wanted, unwanted = tokenizer(8).pair("", "moon " * 7)
    assert [inner(chunk) for chunk in wanted] == [[], []]


def test_more_tokens_than_anyone_needs_are_a_bad_request() -> None:
    assert tokenizer().count("red " * MOST_TOKENS) == MOST_TOKENS
    for prompt in ("red " * (MOST_TOKENS + 1), "🎈" * 1000):
        with pytest.raises(BadRequest) as refused:
            tokenizer().encode(prompt)
        assert refused.value.reason == "prompt_long"
        assert refused.value.hint


def test_a_lone_surrogate_is_a_bad_request_that_quotes_nothing() -> None:
    with pytest.raises(BadRequest) as refused:
        tokenizer().encode("canary \udc80")
    assert "canary" not in f"{refused.value} {refused.value.hint} {refused.value.__cause__} "
    assert refused.value.__suppress_context__


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_tokenized_or_a_bad_request(text: str) -> None:
    try:
        chunks = SHARED.encode(text)
    except BadRequest:
        return
    assert all(0 <= int(chunk.ids.min()) <= int(chunk.ids.max()) < len(IDS) for chunk in chunks)


SHARED: Final = tokenizer(8)


def test_no_repr_shows_the_tokens() -> None:
    [chunk] = tokenizer().encode("red")
    assert str(RED) not in repr(chunk)


def test_truncation_and_padding_in_the_file_change_nothing() -> None:
    assert DOCUMENT["truncation"]["max_length"] == 4
    assert tokenizer().count("red " * 50) == 50


def test_files_of_older_transformers_are_read_too() -> None:
    older = copy.deepcopy(DOCUMENT)
    older["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = WORDS.split("endoftext\\|>|")[1]
    del older["pre_tokenizer"]["pretokenizers"][1]["use_regex"]
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    older["added_tokens"][0]["normalized"] = True
    for key in ("byte_fallback", "ignore_merges"):
        del older["model"][key]
    read = PromptTokenizer(json.dumps(older).encode(), encoding(8))
    assert [inner(chunk) for chunk in read.encode("red apple")] == [[RED, APPLE]]


def changed(path: str, value: object) -> bytes:
    """Return the file with the value at `path` (keys and positions, separated by slashes) replaced."""
    document = copy.deepcopy(DOCUMENT)
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    place = document
    for key in parents:
        place = place[key]    # type: ignore[index]
    place[last] = value     # type: ignore[index]
    return json.dumps(document).encode()


HOSTILE: Final = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": b"{",
    "nested without end": b"[" * 1_000_000,
    "another type": b"[]",
    "nothing in it": b"{}",
    "too large": b" " * (LARGEST + 1),
    "another model": changed("model/type", "WordPiece"),
    "random merges": changed("model/dropout", 0.5),
    "no vocabulary": changed("model/vocab", {}),
    "an id twice": changed("model/vocab", {**IDS, "x": 1, "y": 1}),
    "an id out of range": changed("model/vocab", {**IDS, "huge": 2**32}),
    "a negative id": changed("model/vocab", {**IDS, "low": -1}),
    "an id that is true": changed("model/vocab", {"a": True}),
    "too many merges": changed("model/merges", [["r", "e"]] * 200_001),
    "a merge of unknown tokens": changed("model/merges", [["never", "heard"]]),
    "merges of another shape": changed("model/merges", [1, 2]),
    "an unknown token that is unknown": changed("model/unk_token", "<unk>"),
    "another normalizer": changed("normalizer", {"type": "Lowercase"}),
    "a normalizer that crashes the library": changed("normalizer/normalizers/1/pattern/Regex", ""),
    "an expression that takes forever": changed("pre_tokenizer/pretokenizers/0/pattern/Regex", "(a+)+$"),
    "another pre-tokenizer": changed("pre_tokenizer", {"type": "Whitespace"}),
    "a token that swallows spaces": changed("added_tokens/0/lstrip", True),
    "a token without content": changed("added_tokens/0/content", ""),
    "a token without an id": changed("added_tokens/0/id", None),
    "added tokens of another shape": changed("added_tokens", {}),
    "no start token": changed("model/vocab", {k: v for k, v in IDS.items() if k not in (START, END)}),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_tokenizer_file_is_refused(name: str) -> None:
    with pytest.raises(VerificationRefused) as refused:
        PromptTokenizer(HOSTILE[name], encoding())
    assert str(refused.value).startswith("tokenizer.json: ")
    assert refused.value.hint


def test_a_file_that_lacks_an_id_of_the_description_is_refused() -> None:
    with pytest.raises(VerificationRefused, match="does not know the pad_id"):
        PromptTokenizer(json.dumps(DOCUMENT).encode(), TextEncoding(77, 8, IDS[START], IDS[END], 999_999))


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([
    "added_tokens", "added_tokens/0", "added_tokens/0/id", "added_tokens/0/content", "added_tokens/1/special", "normalizer",
    "normalizer/normalizers/0", "pre_tokenizer", "pre_tokenizer/pretokenizers", "pre_tokenizer/pretokenizers/1", "model",
    "model/vocab", "model/vocab/a", "model/merges", "model/merges/0", "model/merges/1/0", "model/unk_token", "model/fuse_unk",
]), JSON)
def test_any_change_to_the_file_is_harmless_or_refused(path: str, value: object) -> None:
    try:
        read = PromptTokenizer(changed(path, value), encoding())
    except VerificationRefused:
        return
    read.encode("Red apples, don't 12 🎈")


def test_importing_the_tokenizer_brings_no_network_client() -> None:
    program = (
        "import sys; before = set(sys.modules); import appliance.engine.tokenizer; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "tokenizers" in imported
    assert not imported & {
        "huggingface_hub", "requests", "urllib3", "httpx", "http", "aiohttp", "ssl", "torch", "transformers", "diffusers",
    }


def test_weights_of_one_leave_the_context_bit_for_bit() -> None:
    context = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert apply_weights(context, np.ones(5, np.float32)).tobytes() == context.tobytes()


def test_weights_multiply_rows_and_leave_the_mean_as_it_was() -> None:
    context = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) + 0.5
    weights = np.array([1, 1, 1.6, 1, 1], np.float32)
    before = context.copy()
    weighted = apply_weights(context, weights)
    assert np.array_equal(context, before)
    assert weighted.dtype == np.float32
    assert float(weighted.mean()) == pytest.approx(float(context.mean()), rel=1e-5)
    ratios = weighted / context
    assert np.allclose(ratios, ratios[:, :1], rtol=1e-5)
    assert ratios[2, 0] / ratios[0, 0] == pytest.approx(1.6, rel=1e-5)
    assert ratios[0, 0] < 1


def test_where_the_mean_says_nothing_the_weights_stand_alone() -> None:
    context = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    context -= context.mean(axis=1, keepdims=True)
    weights = np.array([1, 0, -2, 1.6, 1], np.float32)
    assert np.array_equal(apply_weights(context, weights), context * weights[:, np.newaxis])
