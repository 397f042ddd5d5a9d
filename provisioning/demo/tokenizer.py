"""The built-in model's own CLIP-style byte-pair vocabulary, learned from its captions with the `tokenizers` library.

The files are those of Stable Diffusion 1.5 (`vocab.json`, `merges.txt` and their configuration), so that whatever reads
one reads the other. Only the length differs: 32 tokens hold every caption, and a text encoder that reads 32 costs less
than half of one that reads 77. A longer prompt is read in chunks by the engine, as everywhere.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from provisioning.demo.captions import Facts, caption
from provisioning.demo.vocabulary import ADJECTIVES, ENDINGS, FLAT_WORDS, OPENINGS, Subject

LENGTH: Final = 32
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
_MERGES: Final = 3000
# CLIP's own way to cut a text into words (openai/CLIP, simple_tokenizer.py).
_WORDS: Final = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def learn(facts: Iterable[Facts], subjects: Iterable[Subject], folder: Path, *, seed: int = 1) -> Any:
    """Learn merges from captions of the pictures, write the tokenizer's files to `folder` and return a CLIPTokenizer."""
    rng = random.Random(seed)
    lines = [caption(fact, rng) for fact in facts for _ in range(2)]
    # A name is a token of its own, or nearly, however rare it is in captions.
    lines += [name for subject in subjects for name in subject.names for _ in range(200)]
    lines += [word for words in (OPENINGS, ADJECTIVES, ENDINGS, FLAT_WORDS) for word in words for _ in range(20)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + _MERGES, min_frequency=2, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned]
    _write(merges, sorted(alphabet), folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def _write(merges: list[tuple[str, str]], alphabet: list[str], folder: Path) -> None:
    """Write the four files; ids in CLIP's order: characters, characters that end a word, merges, the two marks."""
    tokens = collections.OrderedDict.fromkeys(
        [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_prefix_space": False, "bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END,
        "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer",
    }, indent=1), encoding="utf-8")
