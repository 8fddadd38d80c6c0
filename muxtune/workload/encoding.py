"""Examples to token sequences that say which of their tokens are to be learnt.

The tokenizer is injected, so that the core needs no library for it. Chats go through the model's
own chat template; where the assistant's turns lie in the result is found by rendering parts of
the chat (``assistant_spans``), which needs no support from the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from muxtune.errors import DataError
from muxtune.workload.examples import ChatExample, CompletionExample, Example, Message, TextExample


class Tokenizer(Protocol):
    """One base model's tokenizer and chat template; the runtime adapts the real one."""

    @property
    def bos_id(self) -> int | None:
        """Token that the model expects before plain text; None where it expects none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Token that ends a text."""
        ...

    @property
    def max_length_tokens(self) -> int | None:
        """The longest sequence that the model takes; None: unknown."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Token ids; adds no special token, but recognises those that the text spells out."""
        ...

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The chat template's text, special tokens spelt out. May raise anything."""
        ...


class EncodedSequence(NamedTuple):
    """``tokens``: [n] int32. ``target_mask``: [n] bool, row i predicts token i + 1 and counts when
    that token is to be learnt; the last row never counts."""

    tokens: np.ndarray
    target_mask: np.ndarray

    @property
    def target_tokens(self) -> int:
        return int(self.target_mask.sum())


class EncodedExample(NamedTuple):
    """Sequences of one document; ``cut``: learnt tokens beyond the maximum were dropped."""

    sequences: tuple[EncodedSequence, ...]
    cut: bool = False


def encode_example(
    example: Example, tokenizer: Tokenizer, max_length_tokens: int, path: str
) -> EncodedExample:
    """Sequences of at most ``max_length_tokens`` tokens.

    Text is split into consecutive pieces; pieces of one token, which teach nothing, are left out.
    A prompt with completion and a chat stay one sequence, whose tail is dropped if need be.
    Raises DataError, naming ``path`` and the line, when that leaves nothing to learn.
    """
    if isinstance(example, TextExample):
        return _pieces(_with_ends(tokenizer, tokenizer.encode(example.text)), max_length_tokens)
    if isinstance(example, CompletionExample):
        segments = [(example.prompt, False), (example.completion, True)]
        ids, learnt = _encode_segments(tokenizer, segments)
        ids = _with_ends(tokenizer, ids)
        learnt = [False] * (tokenizer.bos_id is not None) + learnt
        learnt += [True] * (len(ids) - len(learnt))
    else:
        ids, learnt = _encode_segments(tokenizer, _chat_segments(example, tokenizer, path))
    return _one(ids, learnt, max_length_tokens, path, example.line)


def _with_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [*first, *ids, *last]


def _pieces(ids: list[int], max_length_tokens: int) -> EncodedExample:
    starts = range(0, len(ids), max_length_tokens)
    pieces = [ids[start : start + max_length_tokens] for start in starts]
    return EncodedExample(
        tuple(_sequence(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1)
    )


def _encode_segments(
    tokenizer: Tokenizer, segments: Sequence[tuple[str, bool]]
) -> tuple[list[int], list[bool]]:
    """Segments are encoded apart, because that is what the model sees when it is used: first a
    prompt, then its own tokens. So no token straddles the border of what is learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    for text, is_learnt in segments:
        encoded = tokenizer.encode(text) if text else ()
        ids.extend(encoded)
        learnt.extend([is_learnt] * len(encoded))
    return ids, learnt


def _one(
    ids: list[int], learnt: list[bool], max_length_tokens: int, path: str, line: int
) -> EncodedExample:
    if any(learnt[1:max_length_tokens]):
        kept = _sequence(ids[:max_length_tokens], learnt[:max_length_tokens])
        return EncodedExample((kept,), cut=any(learnt[max_length_tokens:]))
    if len(ids) > max_length_tokens:
        problem = (
            f"what is to be learnt starts after max_length {max_length_tokens} tokens "
            f"of an example with {len(ids)}"
        )
        raise DataError(path, problem, "Raise max_length, or shorten or remove the line", line)
    raise DataError(path, "the example has no token to learn", "Remove the line", line)


def _sequence(ids: Sequence[int], learnt: Sequence[bool]) -> EncodedSequence:
    target_mask = np.zeros(len(ids), dtype=np.bool_)
    target_mask[:-1] = learnt[1:]
    return EncodedSequence(np.array(ids, dtype=np.int32), target_mask)


# ----------------------------------------------------------------------------------------- chats


def _chat_segments(example: ChatExample, tokenizer: Tokenizer, path: str) -> list[tuple[str, bool]]:
    try:
        text, spans = assistant_spans(example.messages, tokenizer)
    except DataError:
        raise
    except Exception as error:  # a template is the model's code and raises what it likes
        remedy = "Change the roles or their order to what the model's template takes"
        problem = f"the model's chat template refuses the conversation: {error}"
        raise DataError(path, problem, remedy, example.line) from error
    segments: list[tuple[str, bool]] = []
    done = 0
    for start, stop in spans:
        segments += [(text[done:start], False), (text[start:stop], True)]
        done = stop
    return [*segments, (text[done:], False)]


def assistant_spans(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and the character ranges that the assistant itself has to write.

    A range starts where the template's generation prompt ends and stops after the end-of-turn
    marker, without the white space behind it. The place of a turn's content is found by rendering
    the chat once more with a placeholder instead of it, so that content which also occurs
    elsewhere is not mistaken. Raises what the template raises.
    """
    text = tokenizer.render_chat(messages, False)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        content = _content_span(text, messages, index, tokenizer)
        if content is None:  # the template dropped this turn
            continue
        start = _turn_start(text, content[0], messages[:index], tokenizer)
        stop = _turn_stop(text, content[1], messages[: index + 1], tokenizer)
        start = max(start, spans[-1][1] if spans else 0)
        if start < stop:
            spans.append((start, stop))
    return text, spans


def _placeholder(messages: Sequence[Message]) -> str:
    name = "placeholder"
    while any(name in message.content for message in messages):
        name += "0"
    return name


def _without(
    messages: Sequence[Message], index: int, tokenizer: Tokenizer
) -> tuple[str, str] | None:
    """What the rendered chat has before and after the content of one message."""
    name = _placeholder(messages)
    changed = list(messages)
    changed[index] = messages[index]._replace(content=name)
    before, found, after = tokenizer.render_chat(changed, False).partition(name)
    return (before, after) if found else None


def _content_span(
    text: str, messages: Sequence[Message], index: int, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    around = _without(messages, index, tokenizer)
    if around is None:
        return None
    before, after = around
    start, stop = len(before), len(text) - len(after)
    if start <= stop and text.startswith(before) and text.endswith(after):
        return start, stop
    # The template treats this content unlike the placeholder (say, it cuts out a thought).
    start = text.rfind(messages[index].content.strip())
    return None if start < 0 else (start, start + len(messages[index].content.strip()))


def _turn_start(
    text: str, content_start: int, earlier: Sequence[Message], tokenizer: Tokenizer
) -> int:
    try:
        asked = tokenizer.render_chat(earlier, True)
        unasked = tokenizer.render_chat(earlier, False)
    except Exception:  # many templates refuse an empty or unfinished chat
        return content_start
    if not text.startswith(asked):
        return content_start
    # A template that knows no generation prompt would count its own header as learnt.
    header_is_blank = not text[len(asked) : content_start].strip()
    return len(asked) if asked != unasked or header_is_blank else content_start


def _turn_stop(text: str, content_stop: int, until: Sequence[Message], tokenizer: Tokenizer) -> int:
    try:
        around = _without(until, len(until) - 1, tokenizer)
    except Exception:  # as above
        return content_stop
    marker = around[1].rstrip() if around else ""
    return content_stop + len(marker) if text.startswith(marker, content_stop) else content_stop
