"""Text as ids, in which the strings of special tokens are text like any other."""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from being_vl.data.chat import ChatFormat
from being_vl.data.records import PLACEHOLDER
from being_vl.layout import TOKEN_PREFIX

_CUT_MARK = "\udc00"
"""Where a text is cut before it is tokenised; half of a character, so no text holds it."""


class TextEncoder:
    """Turns text into ids, without BOS.

    Records and questions may hold the string of a special token, which must not become that token. `escape` marks such
    strings; `encode` tokenises the parts before and behind each mark apart. Strings of visual tokens need no mark: the
    tokenizer in use here does not know them.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        chat: Its chat format, which knows the special tokens.
    """

    def __init__(self, tokenizer: Any, chat: ChatFormat) -> None:
        # A copy of the tokenizer that knows no visual tokens.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [
            token for token in state["added_tokens"] if not token["content"].startswith(TOKEN_PREFIX)
        ]
        self._backend = Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))

        # All other special tokens; of two that begin alike, the longer is found first.
        names = [name for name in chat.special_tokens - {PLACEHOLDER} if not name.startswith(TOKEN_PREFIX)]
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def escape(self, text: str) -> str:
        """The text with a mark behind the first character of each special token's string."""
        return self._pattern.sub(lambda match: match[0][0] + _CUT_MARK + match[0][1:], text)

    def encode(self, texts: Iterable[str]) -> dict[str, NDArray[np.int32]]:
        """The ids of each text; each distinct part is tokenised once."""
        parts = {text: text.split(_CUT_MARK) for text in texts}
        if not parts:
            return {}
        distinct_parts = list({part for pieces in parts.values() for part in pieces})
        encodings = self._backend.encode_batch(distinct_parts, add_special_tokens=False)
        ids = {
            part: np.asarray(encoding.ids, np.int32)
            for part, encoding in zip(distinct_parts, encodings, strict=True)
        }
        return {text: np.concatenate([ids[part] for part in pieces]) for text, pieces in parts.items()}

    def to_str(self) -> str:
        """The tokenizer in use, as JSON."""
        text: str = self._backend.to_str()
        return text
