"""Which tokens of an example are learnt, with a tokenizer of characters and several templates."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.errors import DataError
from muxtune.workload.datasets import (
    ChatExample,
    CompletionExample,
    Example,
    Message,
    TextExample,
    encode_example,
)

BOS, EOS = 1, 2
Template = Callable[[Sequence[Message], bool], str]


def chatml(messages: Sequence[Message], ask: bool) -> str:
    """With a default system prompt, as SmolLM2 has."""
    head = "" if messages and messages[0].role == "system" else "<system\nBe nice.>\n"
    turns = "".join(f"<{message.role}\n{message.content}>\n" for message in messages)
    return head + turns + ("<assistant\n" if ask else "")


def instruct(messages: Sequence[Message], ask: bool) -> str:
    """Llama-2 style: no generation prompt, alternation enforced, contents trimmed."""
    text = ""
    for index, (role, content) in enumerate(messages):
        if (role == "user") != (index % 2 == 0):
            raise RuntimeError("roles must alternate")
        text += f"[{content.strip()}]" if role == "user" else f" {content.strip()}$"
    return text


def named(messages: Sequence[Message], ask: bool) -> str:
    """Headers that the template writes whether asked or not, and no end-of-turn marker."""
    return "".join(f"{message.role}: {message.content}\n" for message in messages)


def thinking(messages: Sequence[Message], ask: bool) -> str:
    """Cuts thoughts out of all but the last turn, and asks with an opened thought."""
    text = ""
    for index, (role, content) in enumerate(messages):
        if role == "assistant" and index < len(messages) - 1:
            content = content.rpartition("/think ")[2]
        text += f"<{role}|{content}>"
    return text + ("<assistant|think " if ask else "")


class Characters:
    """Each character is a token."""

    def __init__(
        self, template: Template = chatml, bos: int | None = None, eos: int | None = EOS
    ) -> None:
        self.bos_id, self.eos_id, self.max_length_tokens = bos, eos, 1000
        self._template = template

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._template(messages, add_generation_prompt)


def learnt(example: Example, tokenizer: Characters, max_length_tokens: int = 1000) -> list[str]:
    """Runs of learnt characters of each sequence, joined by '|'; EOS is '#'."""
    encoded = encode_example(example, tokenizer, max_length_tokens, "data.jsonl")
    texts = []
    for tokens, target_mask in encoded.sequences:
        assert len(tokens) == len(target_mask) <= max_length_tokens and not target_mask[-1]
        text = ""
        for row, token in enumerate(tokens[1:].tolist()):
            text += ("#" if token == EOS else chr(token)) if target_mask[row] else "|"
        texts.append("|".join(part for part in text.split("|") if part))
    return texts


def chat(*contents: str, system: bool = False) -> ChatExample:
    roles = (["system"] if system else []) + ["user", "assistant"] * len(contents)
    return ChatExample(
        7, tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    )


def test_all_of_a_text_is_learnt_but_its_first_token() -> None:
    assert learnt(TextExample(1, "abc"), Characters()) == ["bc#"]
    assert learnt(TextExample(1, "abc"), Characters(bos=BOS)) == ["abc#"]
    assert learnt(TextExample(1, "abc"), Characters(eos=None)) == ["bc"]


def test_long_text_is_split_and_one_token_pieces_are_left_out() -> None:
    assert learnt(TextExample(1, "abcdefgh"), Characters(eos=None), 3) == ["bc", "ef", "h"]
    assert learnt(TextExample(1, "abcdef"), Characters(), 3) == ["bc", "ef"]
    assert learnt(TextExample(1, "a"), Characters(eos=None), 3) == []


def test_only_the_completion_and_its_end_are_learnt() -> None:
    example = CompletionExample(1, "2+2=", "four")
    assert learnt(example, Characters()) == ["four#"]
    assert learnt(example, Characters(bos=BOS, eos=None)) == ["four"]
    assert learnt(CompletionExample(1, "", "four"), Characters(bos=BOS)) == ["four#"]
    assert learnt(CompletionExample(1, "", "four"), Characters()) == ["our#"]


def test_a_cut_completion_is_told_and_a_lost_one_refused() -> None:
    example = CompletionExample(3, "2+2=", "four")
    encoded = encode_example(example, Characters(), 6, "data.jsonl")
    assert encoded.cut and learnt(example, Characters(), 6) == ["fo"]
    assert not encode_example(example, Characters(), 9, "data.jsonl").cut
    with pytest.raises(DataError, match=r"data\.jsonl:3: .* max_length 4 tokens .* with 9\. Raise"):
        encode_example(example, Characters(), 4, "data.jsonl")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chatml, "hello>|user>"),
        (instruct, " hello$| user$"),
        (named, "hello|user"),
        (thinking, "hello>|user>"),
    ],
)
def test_assistant_turns_of_any_template(template: Template, expected: str) -> None:
    # The second answer also occurs in headers and as a question: it must not be mistaken.
    example = chat("user", "hello", "assistant", "user")
    assert learnt(example, Characters(template)) == [expected]


def test_system_prompt_is_not_learnt() -> None:
    assert learnt(chat("sys", "q", "a", system=True), Characters()) == ["a>"]


def test_two_answers_in_a_row_and_an_answer_first() -> None:
    messages = tuple(
        Message(role, text)
        for role, text in [("assistant", "one"), ("assistant", "two"), ("user", "three")]
    )
    assert learnt(ChatExample(1, messages), Characters()) == ["one>|two>"]
    assert learnt(ChatExample(1, messages), Characters(thinking)) == ["one>|two>"]


def test_a_template_that_cuts_thoughts() -> None:
    example = chat("q", "think a /think b", "r", "think c /think d")
    assert learnt(example, Characters(thinking)) == ["b>|c /think d>"]


def test_a_cut_chat_is_told_and_a_lost_one_refused() -> None:
    example = chat("question", "answer")
    size = len(chatml(example.messages, False))
    assert learnt(example, Characters(), size - 4) == ["answ"]
    assert encode_example(example, Characters(), size - 4, "d").cut
    assert not encode_example(example, Characters(), size - 1, "d").cut  # only the line end is lost
    with pytest.raises(DataError, match="d:7: what is to be learnt starts after max_length 20"):
        encode_example(example, Characters(), 20, "d")


def test_a_conversation_that_the_template_refuses() -> None:
    messages = (Message("system", "s"), Message("assistant", "a"))
    with pytest.raises(DataError, match=r"d:5: .*refuses the conversation: roles must alternate"):
        encode_example(ChatExample(5, messages), Characters(instruct), 100, "d")


def test_a_template_that_drops_the_answer() -> None:
    def silent(messages: Sequence[Message], ask: bool) -> str:
        return "".join(message.content for message in messages if message.role == "user") + "??"

    with pytest.raises(DataError, match="d:7: the example has no token to learn"):
        encode_example(chat("q", "a"), Characters(silent), 100, "d")


contents = st.lists(st.text("aeu: s\n", min_size=1, max_size=8).map(lambda text: f"x{text}x"))


@given(contents.filter(lambda texts: len(texts) >= 2), st.sampled_from([chatml, instruct, named]))
def test_exactly_the_answers_are_learnt(texts: list[str], template: Template) -> None:
    texts = texts[: len(texts) // 2 * 2]
    marker = ">" if template is chatml else "$" if template is instruct else ""
    space = " " if template is instruct else ""
    expected = "|".join(f"{space}{text}{marker}" for text in texts[1::2])
    assert learnt(chat(*texts), Characters(template)) == [expected]
