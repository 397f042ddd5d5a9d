"""The appliance's tokenizer against transformers' CLIPTokenizer, from files as a Stable Diffusion folder has them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trained
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from appliance.engine.tokenizer import PromptTokenizer
from appliance.trust.description import TextEncoding

CAPTIONS = (
    "a photo of a beautiful castle", "a red apple on a blue ground", "don't stop, it's the 12 o'clock train",
    "caffè, naïve café über straße", "ein grüner Baum", "猫 と 犬", "the castle's red and green apples",
)     # fmt: skip
TEXTS = st.text(st.sampled_from("aeioustr ABC'’sdm123,.!?-_()<|>\n\t éÉßİıﬁΣ猫犬🎈"), max_size=40) | st.text(max_size=30)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a small CLIPTokenizer, learned from a few captions."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Trained(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(CAPTIONS, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
    ))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges),
                            "<|startoftext|>", "<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def ours(theirs: Any) -> PromptTokenizer:
    return PromptTokenizer(theirs.backend_tokenizer.to_str().encode(), TextEncoding(
        77, 8, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    ))


def check(text: str, ours: PromptTokenizer, theirs: Any) -> None:
    escaped = "".join("\\" + c if c in "\\()[]" else c for c in text)
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    chunks = ours.encode(escaped)
    if len(expected) <= 75:
        padded = theirs(text, padding="max_length", max_length=77)["input_ids"]
        assert [chunk.ids.tolist() for chunk in chunks] == [padded]
    assert ours.count(escaped) == len(expected)


@pytest.mark.parametrize("text", [*CAPTIONS, "", "A  RED\n\napple", "123,456", "it's we'll I'm", "<|endoftext|> after", "🎈🎈"])
def test_ids_are_those_of_clip_tokenizer(text: str, ours: PromptTokenizer, theirs: Any) -> None:
    check(text, ours, theirs)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS.filter(lambda text: "BREAK" not in text and "<" not in text))
def test_ids_are_those_of_clip_tokenizer_for_any_text(text: str, ours: PromptTokenizer, theirs: Any) -> None:
    check(text, ours, theirs)
