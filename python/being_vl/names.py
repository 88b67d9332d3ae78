"""Messages, and the names of files, keys and fields in them, whatever they hold."""

import logging

NAME_LENGTH = 200
"""Most characters of a name in a message."""
ERROR_LENGTH = 2000
"""Most characters of an error."""
LINE_LENGTH = 1000
"""Most characters of a log line."""


def show_name(name: object, length: int = NAME_LENGTH) -> str:
    """A name for a message: control characters and halves of characters escaped, the middle of a long one left out.

    Args:
        name: A string, a path, or what stands where one was expected.
        length: Most characters of the result.
    """
    text = _escape(str(name))
    return _cut(text, length)


def show_error(error: object, length: int = ERROR_LENGTH) -> str:
    """The text of an error in one line, as `show_name` shows a name."""
    text = str(error)
    # Escapes make a text longer, never shorter, so what is far beyond the length need not be looked at.
    lines = (line.strip() for line in _cut(text, 4 * length).splitlines())
    return _cut(_escape(" ".join(line for line in lines if line)), length)


def show_lines(text: str, length: int = LINE_LENGTH, count: int = 100) -> str:
    """The lines of a message, at most so many, each as `show_name` shows a name; tabs are kept."""
    lines = text.split("\n")
    if len(lines) > count:
        middle = f"… {len(lines) - count + 1:,} lines …"
        lines = [*lines[: count // 2], middle, *lines[-(count - count // 2 - 1) :]]
    return "\n".join(_cut(_escape(_cut(line, 4 * length), keep="\t"), length) for line in lines)


class LineFormatter(logging.Formatter):
    """Formats log records so that no name in them makes a message long, or changes what a terminal shows.

    Warnings of being_vl begin with `warning: `.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message with its names escaped and its lines cut."""
        text = show_lines(super().formatMessage(record))
        is_warning = record.levelno >= logging.WARNING and record.name.startswith("being_vl")
        return f"{record.levelname.lower()}: {text}" if is_warning else text


def _escape(text: str, keep: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def _cut(text: str, length: int) -> str:
    """A text without its middle, if it is longer."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
