"""A conversation as pieces of text and images, in the order in which the model reads them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from being_vl.data.chat import ChatFormat
from being_vl.data.options import LossOptions
from being_vl.data.records import PLACEHOLDER, Turn
from being_vl.data.text import TextEncoder

_LEADING_IMAGES = re.compile(rf"\s*({PLACEHOLDER}\s*)+")
_TRAILING_IMAGES = re.compile(rf"(\s*\n\s*{PLACEHOLDER})+\s*\Z")


class ImageSlot(NamedTuple):
    """Stands among pieces of text for an image of the conversation, by its number there."""

    number: int


class Piece(NamedTuple):
    """A piece of a sequence, and the weight of the loss on it."""

    content: str | ImageSlot
    weight: float


def write_pieces(
    turns: Sequence[Turn], num_images: int, chat: ChatFormat, text: TextEncoder, loss: LossOptions
) -> list[Piece]:
    """Write a conversation as pieces.

    Args:
        turns: Of user and assistant, or a caption.
        num_images: Images of the conversation.
        chat: Writes the text around the turns.
        text: Marks special tokens' strings in the turns.
        loss: What carries loss.
    """
    texts = [text.escape(turn.text.strip()) for turn in turns]

    # A caption is written without a template.
    if len(turns) == 1 and turns[0].role == "assistant":
        images = [Piece(ImageSlot(number), loss.images) for number in range(num_images)]
        return [*images, Piece(texts[0] + chat.answer_end, loss.captions * turns[0].has_loss)]

    # Images that lead the conversation come before the template's text.
    system = texts.pop(0) if turns[0].role == "system" else None
    weights = [_weigh(turn, loss) for turn in (turns if system is None else turns[1:])]
    if not turns[0].has_loss:  # the template writes the system turn and the first question as one
        weights[0] = 0.0
    num_leading, texts[0] = _take_leading(texts[0], num_images)
    if not num_leading and not any(PLACEHOLDER in question for question in texts):
        num_leading = num_images
    pieces = [Piece(ImageSlot(number), loss.images) for number in range(num_leading)]

    # The others stay where their placeholders are.
    number = num_leading
    for (content, is_answer), weight in zip(chat.write(texts, system), weights, strict=True):
        if is_answer or not num_images:
            pieces.append(Piece(content, weight))
            continue
        head, *tails = content.split(PLACEHOLDER)
        pieces.append(Piece(head, weight))
        for tail in tails:
            pieces += [Piece(ImageSlot(number), loss.images), Piece(tail, weight)]
            number += 1
    return [piece for piece in pieces if piece.content != ""]


def _weigh(turn: Turn, loss: LossOptions) -> float:
    """The weight of the loss on a turn, with what the chat template writes in front of it."""
    return (loss.answers if turn.role == "assistant" else loss.questions) * turn.has_loss


def _take_leading(text: str, num_images: int) -> tuple[int, str]:
    """How many placeholders of the first question stand for images in front of the text, and the text without them."""
    for pattern in (_LEADING_IMAGES, _TRAILING_IMAGES):
        match = pattern.match(text) if pattern is _LEADING_IMAGES else pattern.search(text)
        if num_images and match:
            count = match[0].count(PLACEHOLDER)
            if pattern is _LEADING_IMAGES or count == text.count(PLACEHOLDER):
                return count, (text[: match.start()] + text[match.end() :]).strip()
    return 0, text
