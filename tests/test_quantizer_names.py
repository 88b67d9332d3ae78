"""Two quantizers are told apart by their fingerprints, and named so in messages."""

import pytest

from being_vl.errors import QuantizerError
from being_vl.quantizer_names import check_same_quantizer, describe_quantizer


def test_a_quantizer_is_named_with_the_start_of_its_fingerprint() -> None:
    assert describe_quantizer("vq", "0123456789abcdef") == "'vq' (0123456789ab)"


def test_two_quantizers_are_refused_by_their_fingerprints() -> None:
    check_same_quantizer("a.json", ("vq", "a" * 64), "the model", ("renamed", "a" * 64))
    check_same_quantizer("a.json", (None, None), "the model", ("vq", "a" * 64))
    expected = r"a\.json: is of quantizer 'vq' \(a{12}\), but the model is of 'vq' \(b{12}\)"
    with pytest.raises(QuantizerError, match=expected):
        check_same_quantizer("a.json", ("vq", "a" * 64), "the model", ("vq", "b" * 64))
