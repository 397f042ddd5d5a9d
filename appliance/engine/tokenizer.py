"""Prompts to token ids and weights, in the chunks that the text encoder reads.

This room holds CLIP's byte-pair vocabulary, run by the `tokenizers` library from bytes in memory. Of a bundle's
`tokenizer.json` it takes the data alone: vocabulary, merges, added tokens. The machinery around them (how text is
normalized and cut into words) must be one of the two that CLIP tokenizers have, letter for letter: a regular expression of
somebody else's can stall the engine or crash the library, and its crash reports quote the text.

Rules, in order:

1. The file is refused unless it is a CLIP tokenizer and knows the ids that `model.json` names; nothing random (dropout).
2. Each stretch of one weight is tokenized by itself, as in A1111. A prompt of more than `MOST_TOKENS` tokens is a `BadRequest`.
3. A chunk is start, up to `max_length` - 2 tokens, end, padding. Text that overflows goes on in the next chunk, from its last
   comma if that is near (A1111's "comma padding backtrack": 20 of 75 tokens, here the same share of a shorter chunk).
4. Start, end and padding weigh 1, so a prompt without weights comes out of `apply_weights` bit for bit as it went in.
5. Token ids are content, as the prompt is: no `repr` shows them and no message holds them.

For a `tokenizer.json` with the vocabulary of CLIP:

    [chunk] = PromptTokenizer(tokenizer_json, text).encode("a (red:1.5) apple")
    chunk.ids        # 49406, 320, 736, 3055, 49407, 49407, …
    chunk.weights    # 1, 1, 1.5, 1, 1, 1, …
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from appliance.engine.prompt import WeightedText, parse_prompt
from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.description import TextEncoding

PLACE: Final = "tokenizer.json"
LARGEST: Final = 16 << 20       # bytes; CLIP's has 2.2 million
MOST_ENTRIES: Final = 200_000   # of vocabulary and of merges; CLIP has 49,408
MOST_TOKENS: Final = 1_500      # 20 chunks of 75: attention over more would cost gigabytes, and no picture heeds it

_NORMALIZER: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"},
    ],
}
_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CUTS: Final = (_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS)    # before and since transformers 5
_ADDED: Final = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

# A mean this small beside the root mean square is what rounding and chance leave of zero; ratios of such means are noise.
_MEANINGFUL_MEAN: Final = 1e-3


@dataclass(frozen=True)
class Chunk:
    """What one run of the text encoder reads: start, tokens, end, padding."""

    ids: NDArray[np.int64] = field(repr=False)          # (max_length,)
    weights: NDArray[np.float32] = field(repr=False)    # (max_length,)


class PromptTokenizer:
    """One bundle's tokenizer."""

    def __init__(self, tokenizer_json: bytes, text: TextEncoding) -> None:
        """Read the verified bytes of `tokenizer.json`; raises `VerificationRefused` if they are not usable."""
        self._text = text
        self._tokenizer = _load(tokenizer_json)
        for name in ("start_id", "end_id", "pad_id"):
            if self._tokenizer.id_to_token(getattr(text, name)) is None:
                _refuse(f"does not know the {name} that model.json names")
        self._comma: int | None = self._tokenizer.token_to_id(",</w>")

    def encode(self, prompt: str) -> list[Chunk]:
        """Return the prompt's chunks, at least one. Raises `BadRequest` as `parse_prompt` does, and beyond `MOST_TOKENS`."""
        tokens = self._tokens(parse_prompt(prompt))
        room = self._text.max_length - 2
        backtrack = room * 20 // 75
        chunks = []
        while len(tokens) > room:
            end = room
            # As in A1111, a comma that overflows by itself begins the next chunk and sends nothing after it.
            if tokens[room][0] != self._comma:
                commas = [i for i in range(room - backtrack, room) if tokens[i][0] == self._comma]
                end = commas[-1] + 1 if commas else room
            chunks.append(self._chunk(tokens[:end]))
            tokens = tokens[end:]
        if tokens or not chunks:
            chunks.append(self._chunk(tokens))
        return chunks

    def pair(self, prompt: str, negative: str) -> tuple[list[Chunk], list[Chunk]]:
        """Return the chunks of both, the shorter one filled up with empty chunks. Raises `BadRequest`."""
        wanted, unwanted = self.encode(prompt), self.encode(negative)
        most = max(len(wanted), len(unwanted))
        for chunks in (wanted, unwanted):
            chunks.extend(self._chunk([]) for _ in range(most - len(chunks)))
        return wanted, unwanted

    def count(self, prompt: str) -> int:
        """Return how many tokens the prompt has, without start, end and padding. Raises `BadRequest`."""
        return len(self._tokens(parse_prompt(prompt)))

    def _tokens(self, parts: tuple[WeightedText, ...]) -> list[tuple[int, float]]:
        tokens: list[tuple[int, float]] = []
        for part in parts:
            try:
                part.text.encode()
            except UnicodeEncodeError:      # its message would quote the prompt
                raise BadRequest(
                    "prompt_characters", "the prompt is not valid text", hint="type it anew as plain text"
                ) from None
            tokens += [(token, part.weight) for token in self._tokenizer.encode(part.text, add_special_tokens=False).ids]
            if len(tokens) > MOST_TOKENS:
                raise BadRequest(
                    "prompt_long",
                    f"the prompt has more than {MOST_TOKENS:,} tokens (a token is a word or a part of one)",
                    hint="shorten it: only the first few hundred words can change a picture",
                )
        return tokens

    def _chunk(self, tokens: list[tuple[int, float]]) -> Chunk:
        ids = np.full(self._text.max_length, self._text.pad_id, np.int64)
        weights = np.ones(self._text.max_length, np.float32)
        ids[0], ids[len(tokens) + 1] = self._text.start_id, self._text.end_id
        if tokens:
            ids[1:len(tokens) + 1], weights[1:len(tokens) + 1] = zip(*tokens, strict=True)
        return Chunk(ids, weights)


def apply_weights(context: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the text encoder's output (tokens, width) with each token's row multiplied by its weight.

    The mean over all of it is then brought back to what it was, as A1111's "original" emphasis does, so that a heavy word
    does not brighten everything. Where a mean is zero but for chance (an encoder whose rows are centred), there is nothing
    to bring back, and the multiplication stands alone.
    """
    if np.all(weights == 1):
        return context
    weighted = context * weights[:, np.newaxis].astype(np.float32)
    before, after = (float(np.mean(values, dtype=np.float64)) for values in (context, weighted))
    smallest = _MEANINGFUL_MEAN * float(np.sqrt(np.mean(np.square(context, dtype=np.float64))))
    if min(abs(before), abs(after)) > smallest and before * after > 0:
        weighted *= np.float32(before / after)
    return weighted


def _load(untrusted_bytes: bytes) -> Any:
    """Return a `Tokenizer` of this file's data and CLIP's machinery."""
    if len(untrusted_bytes) > LARGEST:
        _refuse("too large", expected=f"at most {LARGEST} bytes", got=str(len(untrusted_bytes)))
    try:
        document = json.loads(untrusted_bytes.decode("utf-8"))
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(f"not valid JSON ({type(error).__name__})")
    if not isinstance(document, dict):
        _refuse("not an object")
    document = {
        "version": "1.0",
        "added_tokens": _added_tokens(document.get("added_tokens")),
        "normalizer": _known(document.get("normalizer"), "normalizer", (_NORMALIZER,)),
        "pre_tokenizer": _known(_words(document.get("pre_tokenizer")), "pre_tokenizer", tuple(map(_cutting, _CUTS))),
        "model": _model(document.get("model")),
    }
    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:      # noqa: BLE001 - the library raises nothing more precise
        _refuse(f"the tokenizers library cannot use it ({str(error)[:120]})")


def _model(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        _refuse("model is missing")
    for key, expected in (("type", ("BPE",)), ("end_of_word_suffix", ("</w>",)), ("dropout", (None,)),
                          ("continuing_subword_prefix", (None, "")), ("fuse_unk", (None, False)),
                          ("byte_fallback", (None, False)), ("ignore_merges", (None, False))):
        _known(value.get(key), f"model.{key}", expected)
    vocabulary, merges, unknown = value.get("vocab"), value.get("merges"), value.get("unk_token")
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= MOST_ENTRIES:
        _refuse("model.vocab is no vocabulary", expected=f"1 to {MOST_ENTRIES} entries")
    ids = set(vocabulary.values()) if all(type(entry) is int for entry in vocabulary.values()) else set()
    if len(ids) != len(vocabulary) or not all(0 <= entry < 1_000_000 for entry in ids):
        _refuse("model.vocab does not give each token an id of its own", expected="whole numbers from 0 to 999999")
    if not isinstance(merges, list) or len(merges) > MOST_ENTRIES:
        _refuse("model.merges is no list of merges", expected=f"at most {MOST_ENTRIES} entries")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocabulary):
        _refuse("model.unk_token is not in the vocabulary")
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": merges,
    }


def _added_tokens(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or len(value) > 64:
        _refuse("added_tokens is no list", expected="at most 64 entries")
    added = []
    for entry in value:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            _refuse("added_tokens holds something that is no token")
        if type(entry.get("id")) is not int or not 0 <= entry["id"] < 1_000_000:
            _refuse("added_tokens holds a token without an id")
        # Whether the mark is lowercased first or not, it is the same mark; the rest decides what text it swallows.
        flags = {key: entry.get(key, default) for key, default in _ADDED.items()}
        _known({**flags, "normalized": False}, "added_tokens", (_ADDED,))
        added.append({"id": entry["id"], "content": entry["content"], **_ADDED, "normalized": flags["normalized"] is True})
    return added


def _cutting(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def _words(value: object) -> object:
    """Return the pre-tokenizer with what older files leave out filled in, and offsets, which nobody reads, left aside."""
    if isinstance(value, dict) and isinstance(value.get("pretokenizers"), list) and len(value["pretokenizers"]) == 2:
        split, level = value["pretokenizers"]
        if isinstance(level, dict):
            return {**value, "pretokenizers": [split, {"use_regex": True, **level, "trim_offsets": True}]}
    return value


def _known(value: object, place: str, expected: tuple[object, ...]) -> object:
    # Compared as JSON, where true is not 1 and the order of keys is none.
    if json.dumps(value, sort_keys=True) not in {json.dumps(choice, sort_keys=True) for choice in expected}:
        _refuse(f"{place} is not that of a CLIP tokenizer")
    return value


def _refuse(fact: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
    raise VerificationRefused(
        "tokenizer", PLACE, fact, expected=expected, got=got,
        hint="export the model again: darkroom-provision writes a tokenizer that this engine can read",
    )
