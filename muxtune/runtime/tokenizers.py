"""Tokenizers behind the ``Tokenizer`` protocol of ``muxtune.workload.encoding``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxtune.workload.examples import Message


class HuggingFaceTokenizer:
    """A tokenizer of transformers with its model's chat template.

    ``eos_id`` and the longest sequence come from the model's config: GGUF files are known to
    name another token as the end of a text than the model was trained with.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self._tokenizer = tokenizer
        self._eos_id = _first(config.eos_token_id, tokenizer.eos_token_id)
        self._max_length_tokens = getattr(config, "max_position_embeddings", None)
        added = tokenizer.encode("", add_special_tokens=True)
        expects_bos = bool(added) and added[0] == tokenizer.bos_token_id
        self._bos_id = tokenizer.bos_token_id if expects_bos else None

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @property
    def max_length_tokens(self) -> int | None:
        return self._max_length_tokens

    def encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )


class ByteTokenizer:
    """Bytes modulo the vocabulary, for backbones with random weights."""

    bos_id = None

    def __init__(self, vocab_size: int, max_length_tokens: int | None) -> None:
        self.vocab_size, self.max_length_tokens = vocab_size, max_length_tokens
        self.eos_id = 0

    def encode(self, text: str) -> Sequence[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [f"{message.role}: {message.content}\n" for message in messages]
        return "".join(turns) + ("assistant: " if add_generation_prompt else "")


def _first(*candidates: Any) -> int | None:
    for value in candidates:
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if value is not None:
            return int(value)
    return None
