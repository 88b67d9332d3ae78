"""Names of files, keys and fields in messages, whatever they hold."""

NAME_LENGTH = 200
"""Most characters of a name in a message."""


def show_name(name: object, length: int = NAME_LENGTH) -> str:
    """A name for a message: control characters and halves of characters escaped, the middle of a long one left out.

    Args:
        name: A string, a path, or what stands where one was expected.
        length: Most characters of the result.
    """
    text = str(name)
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
        )
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
