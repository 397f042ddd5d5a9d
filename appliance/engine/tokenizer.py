"""Prompt to token ids and weights. (signatures; the body follows)"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from appliance.trust.description import TextEncoding


@dataclass(frozen=True)
class Chunk:
    """What one run of the text encoder reads: start, the tokens, end, padding; ids decode to the prompt, so no repr."""

    ids: NDArray[np.int64] = field(repr=False)          # (max_length,)
    weights: NDArray[np.float32] = field(repr=False)    # (max_length,)


class PromptTokenizer:
    """Raises VerificationRefused for a tokenizer.json that cannot be used."""

    def __init__(self, tokenizer_json: bytes, text: TextEncoding) -> None: ...

    def encode(self, prompt: str) -> list[Chunk]:
        raise NotImplementedError

    def pair(self, prompt: str, negative: str) -> tuple[list[Chunk], list[Chunk]]:
        raise NotImplementedError

    def count(self, prompt: str) -> int:
        raise NotImplementedError


def apply_weights(context: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `context` (tokens, width) with each token's row multiplied by its weight and the old mean restored."""
    raise NotImplementedError
