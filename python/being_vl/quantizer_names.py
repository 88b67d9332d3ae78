"""How messages name quantizers, and the check that two things belong to the same one."""

from being_vl.errors import QuantizerError


def describe_quantizer(name: str | None, fingerprint: str | None) -> str:
    """`'name' (first 12 hex digits of the fingerprint)`."""
    return f"{name!r} ({(fingerprint or 'unknown')[:12]})"


def check_same_quantizer(
    subject: str,
    quantizer: tuple[str | None, str | None],
    other_name: str,
    other_quantizer: tuple[str | None, str | None],
) -> None:
    """Refuse to mix things of two quantizers; what does not name its quantizer is accepted with any.

    Args:
        subject: What is checked, for the message: a file, a folder or `the grids`.
        quantizer: Name and fingerprint of its quantizer.
        other_name: What it is to go with.
        other_quantizer: Name and fingerprint of that one's quantizer.

    Raises:
        QuantizerError: if the fingerprints differ, with both names.
    """
    if None not in (quantizer[1], other_quantizer[1]) and quantizer[1] != other_quantizer[1]:
        raise QuantizerError(
            f"{subject}: is of quantizer {describe_quantizer(*quantizer)}, but {other_name} is of "
            f"{describe_quantizer(*other_quantizer)}"
        )
