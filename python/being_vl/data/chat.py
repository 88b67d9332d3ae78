"""How a tokenizer writes a conversation: its chat template, taken apart into questions and answers."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from being_vl.errors import ModelError

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""For tokenizers that have no chat template."""


class ChatPiece(NamedTuple):
    """A piece of a written conversation, and whether it is an answer, which the model learns to write."""

    text: str
    is_answer: bool


class _Exchange(NamedTuple):
    """The fixed text around one question and its answer."""

    question_prefix: str
    system_suffix: str
    question_suffix: str
    answer_prefix: str
    answer_suffix: str


class ChatFormat:
    """Writes conversations of user and assistant, and a system turn, as the tokenizer's chat template does.

    The template is rendered with a mark in place of each turn's text, once per number of turns; the text around the
    marks is fixed. So the text up to an answer is the same whether the answer is there (training) or still to come
    (asking), even where a template treats the last answer differently (Qwen3).

    Args:
        tokenizer: A Hugging Face tokenizer; `DEFAULT_TEMPLATE` serves where it has no chat template.

    Attributes:
        bos: Ids that open every sequence: `[bos_token_id]` if the template or the tokenizer writes it, else `[]`.
        end_of_turn: Id of the token that closes an answer.
        answer_end: That token and what the template puts between it and the answer, as text.
        takes_system: Whether the template writes a system turn.
        special_tokens: The tokenizer's special tokens, as strings.

    Raises:
        ModelError: if the template cannot write plain turns, or does not close an answer with a special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "tokenizer"
        added_tokens = tokenizer.added_tokens_decoder.values()
        self.special_tokens = {str(token) for token in added_tokens if token.special} | set(
            tokenizer.all_special_tokens
        )
        self._exchanges = cache(self._take_apart)

        # BOS opens every sequence if the template writes it, or the tokenizer itself.
        self._bos_text = ""
        bos = tokenizer.bos_token
        if bos is not None and (
            self._render(1, bos_token=_mark("bos"))[0].startswith(_mark("bos"))
            or tokenizer("x").input_ids[0] == tokenizer.bos_token_id
        ):
            self._bos_text = bos
        self.bos: list[int] = [tokenizer.bos_token_id] if self._bos_text else []

        # What closes an answer, as the template writes it behind a single one.
        self.answer_end = self._exchanges(1)[0].answer_suffix
        self.end_of_turn: int = tokenizer(self.answer_end, add_special_tokens=False).input_ids[-1]
        try:
            self._render(1, system=True)
            self.takes_system = True
        except ModelError:
            self.takes_system = False

    def write(self, texts: Sequence[str], system: str | None = None) -> list[ChatPiece]:
        """The conversation as pieces of text.

        Args:
            texts: Questions and answers in turn, beginning with a question. After a last question without answer,
                the conversation ends where the answer would begin.
            system: The system turn, if there is one.

        Returns:
            Pieces that alternate: up to an answer, and an answer with its end of turn. BOS is left out.

        Raises:
            ModelError: if there is a system turn and the template does not write it.
        """
        pieces = []
        exchanges = self._exchanges((len(texts) + 1) // 2, system is not None)
        for index, exchange in enumerate(exchanges):
            question, *answer = texts[2 * index : 2 * index + 2]
            if index == 0 and system is not None:
                question = system + exchange.system_suffix + question
            pieces.append(ChatPiece(exchange.question_prefix + question + exchange.question_suffix, False))
            pieces += [
                ChatPiece(exchange.answer_prefix + text + exchange.answer_suffix, True) for text in answer
            ]
        return pieces

    def _take_apart(self, count: int, system: bool = False) -> list[_Exchange]:
        """The fixed text around each of `count` questions and answers."""
        prefix, *fixed_texts = self._render(count, system)
        prefix = prefix.removeprefix(self._bos_text)
        system_suffix = fixed_texts.pop(0) if system else ""
        exchanges = []
        for text_between, answer_suffix in zip(fixed_texts[::2], fixed_texts[1::2], strict=True):
            # Tokenizers join a space to the word behind it, so one in front of an answer belongs to the answer.
            question_suffix = text_between.rstrip(" ")
            space = text_between[len(question_suffix) :]
            end = self._end_of_turn(answer_suffix)
            exchanges.append(_Exchange(prefix, system_suffix, question_suffix, space, answer_suffix[:end]))
            prefix, system_suffix = answer_suffix[end:], ""
        return exchanges

    def _render(self, count: int, system: bool = False, **variables: str) -> list[str]:
        """Render `count` questions with answers; the texts before, between and behind the marks of all turns."""
        roles = ["system"] * system + ["user", "assistant"] * count
        marks = [_mark(str(number)) for number in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        template = None if self._tokenizer.chat_template else DEFAULT_TEMPLATE
        try:
            # Llama 3.2's template writes today's date unless it is given one; a sequence must not depend on the day.
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, date_string="26 Jul 2024", **variables
            )
        except Exception as error:  # whatever a template raises
            raise ModelError(f"{self._name}: its chat template fails on plain turns: {error}") from error
        fixed_texts = []
        for mark in marks:
            prefix, separator, text = text.partition(mark)
            if not separator or mark in text:
                raise ModelError(
                    f"{self._name}: its chat template does not write each turn's text once, in order"
                )
            fixed_texts.append(prefix)
        return [*fixed_texts, text]

    def _end_of_turn(self, text: str) -> int:
        """Where in the text behind an answer its end-of-turn token ends."""
        # The first special token; of several that begin there, the longest.
        candidates = [(text.index(token), -len(token)) for token in self.special_tokens if token in text]
        if not candidates:
            raise ModelError(
                f"{self._name}: its chat template puts no special token behind an answer, so the model could not learn "
                "where to stop; set an eos_token and a chat template that writes it"
            )
        start, negative_length = min(candidates)
        return start - negative_length


def _mark(name: str) -> str:
    return f"@@being-vl:{name}@@"
