"""Vocabulary files: saving, loading, damage, pickles, and the vocabularies that Being-VL-0.5 published."""

import json
import pickle
import re

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import GridError, VocabularyError
from helpers.photos import PHOTOS
from helpers.photos import PHOTOS_K as K


def test_save_and_load(bpe, tmp_path):
    path = tmp_path / "folder" / "vocab.json"
    bpe.save(path)
    loaded_bpe = VisualBPE.load(str(path))
    assert loaded_bpe == bpe
    assert loaded_bpe.merge_infos == bpe.merge_infos
    assert np.array_equal(loaded_bpe.encode(PHOTOS[47]), bpe.encode(PHOTOS[47]))
    assert [file.name for file in path.parent.iterdir()] == ["vocab.json"]
    other_bpe = VisualBPE.train(PHOTOS, K, 3, quantizer_name="vq", quantizer_fingerprint="ab12")
    other_bpe.save(path)
    assert VisualBPE.load(path) == other_bpe != bpe
    assert (other_bpe.quantizer_name, other_bpe.quantizer_fingerprint) == ("vq", "ab12")
    with pytest.raises(IsADirectoryError):
        bpe.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        VisualBPE.load(tmp_path / "none.json")


def test_file_describes_itself(oriented_bpe):
    content = json.loads(oriented_bpe.to_json())
    assert content["format"] == "being-vl/visual-bpe"
    assert content["version"] == 1
    assert (content["merge_mode"], content["alpha"]) == ("oriented", 0.3)
    assert content["num_grids"] == 40
    assert content["grid_sizes"] == [{"height": 32, "width": 32, "grids": 40}]
    info, merge = oriented_bpe.merge_infos[7], content["merges"][7]
    assert merge == dict(zip(("a", "b", "dy", "dx", "n", "n_offset", "s"), info[2:9], strict=True))


def set_merge(index, **fields):
    return lambda content: content["merges"][index].update(fields)


def set_fields(**fields):
    return lambda content: content.update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_fields(format="tokenizer"), "its format is"),
        (set_fields(version=2), "its version is 2"),
        (lambda content: content.pop("format"), "missing field `format`"),
        (lambda content: content.pop("alpha"), "missing field `alpha`"),
        (lambda content: content["merges"][2].pop("n"), "missing field `n` at line"),
        (set_fields(extra=1), "unknown field `extra`"),
        (set_merge(3, dz=1), "unknown field `dz`"),
        (set_fields(num_merges=401), "num_merges is 401, but there are 400"),
        (lambda content: content["merges"].pop(), "num_merges is 400, but there are 399"),
        (set_fields(num_grids=41), "num_grids is 41, but grid_sizes add up to 40"),
        (set_fields(grid_sizes=[{"height": 0, "width": 1, "grids": 40}]), r"grid_sizes\[0\]"),
        (set_fields(base_vocab_size=0), "base_vocab_size = 0"),
        (set_fields(base_vocab_size=2**32 - 1), "more than 16777216 tokens"),
        (set_fields(base_vocab_size=2**32), "invalid value"),
        (set_fields(base_vocab_size=-1), "invalid value"),
        (set_fields(alpha=-1.0), "alpha = -1"),
        (set_fields(alpha=None), "invalid type"),
        (set_fields(sigma=0), "sigma = 0"),
        (set_fields(min_frequency=0), "min_frequency = 0"),
        (set_fields(merge_mode="both"), "unknown variant `both`"),
        (set_fields(merge_mode="pair"), "merge 0: dy and dx belong to oriented mode"),
        (lambda content: content["merges"][4].pop("dx"), "merge 4: oriented mode needs dy and dx"),
        (set_merge(5, a=K + 5), "merge 5: a = 1029 is not an earlier token, expected 0 to 1028"),
        (set_merge(6, b=2**31), "merge 6: b = 2147483648 is not an earlier token"),
        (set_merge(6, b=1.5), "invalid type: floating point"),
        (lambda content: content["merges"].__setitem__(9, content["merges"][8]), "merge 9: the same merge"),
        (set_merge(7, dy=0, dx=0), r"merge 7: offset \(0, 0\)"),
        (set_merge(7, dy=0, dx=-1), r"merge 7: offset \(0, -1\)"),
        (set_merge(7, dy=-1, dx=1), r"merge 7: offset \(-1, 1\)"),
        (set_merge(7, dy=1, dx=-(2**31)), r"merge 7: offset \(1, -2147483648\)"),
        (set_merge(7, dy=65535), "merge 7: offset"),
        (set_merge(8, n=0, n_offset=0), "merge 8: n_offset = 0"),
        (set_merge(8, n=1, n_offset=2), "merge 8: n_offset = 2 is not in 1 to n = 1"),
        (set_merge(8, s=1.5), "merge 8: s = 1.5"),
        (set_merge(8, s=10**400), "number out of range"),
    ],
)
def test_hostile_files(oriented_bpe, tmp_path, damage, message):
    content = json.loads(oriented_bpe.to_json())
    damage(content)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=message) as refusal:
        VisualBPE.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 10**6, b"\xff\xfe", b"\x80\x04K\x01."])
def test_files_that_are_no_vocabulary(content, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=r"vocab.json"):
        VisualBPE.load(path)


def test_truncated_files(pair_bpe):
    text = pair_bpe.to_json()
    for end in range(0, len(text) - 2, 997):
        with pytest.raises(VocabularyError, match="line"):
            VisualBPE.from_json(text[:end])


def test_altered_files(oriented_bpe, tmp_path):
    """Changed digits make other merges, which the checksum shows; spaces change nothing."""
    text = oriented_bpe.to_json()
    path = tmp_path / "vocab.json"
    # Not the digits of S, the last of which may stand for the same number.
    digits = [
        place.start()
        for place in re.finditer(r"\d", text)
        if "." not in text[place.start() - 20 : place.start()]
    ]
    for place in digits[:: len(digits) // 200]:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(VocabularyError, match=r"vocab.json: "):
            VisualBPE.load(path)
    path.write_text(text.replace('"n": ', '"n":  '))
    assert VisualBPE.load(path) == oriented_bpe
    content = json.loads(text)
    content["merges"][0]["n"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match="it was altered: its checksum is"):
        VisualBPE.load(path)
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert VisualBPE.load(path).merges == oriented_bpe.merges


def test_tokens_that_grow_without_end(oriented_bpe):
    """Two hundred doublings: more cells than there are atoms, refused at once by decoding."""
    content = json.loads(oriented_bpe.to_json())
    del content["checksum"]
    fields = {"dy": 1, "dx": 0, "n": 1, "n_offset": 1, "s": 1.0}
    content["merges"] = [{"a": max(K + i - 1, 0), "b": max(K + i - 1, 0), **fields} for i in range(200)]
    content["num_merges"] = 200
    bpe = VisualBPE.from_json(json.dumps(content))
    with pytest.raises(GridError, match="position 0"):
        bpe.decode([bpe.vocab_size - 1], 4, 4)
    with pytest.raises(GridError, match="more cells"):
        bpe.token_to_cells(bpe.vocab_size - 1)
    assert bpe.encode([[0, 1], [1, 0]]).tolist() == [0, 1, 1, 0]


def test_pickle(bpe):
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy == bpe
    ids, regions = copy.encode(PHOTOS[0], return_regions=True)
    regions = pickle.loads(pickle.dumps(regions))
    assert np.array_equal(copy.decode(ids, 32, 32, regions=regions), PHOTOS[0])
    with pytest.raises(TypeError, match="unhashable"):
        hash(bpe)


def test_published_vocabularies(tmp_path):
    """Being-VL-0.5's format, by every protocol of pickle."""
    merges = [((0, 1), 4), ((4, 4), 5), ((1, 0), 6)]
    path = tmp_path / "vocab.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(merges, protocol))
        bpe = VisualBPE.load_published(path, 4)
        assert bpe.merges == [(0, 1), (4, 4), (1, 0)]
        assert bpe.encode([[0, 1, 0, 1]]).tolist() == [5]


class Executable:
    def __reduce__(self):
        return exit, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Executable(), "in a pickle that may hold only ints"),
        ([((0, 1), 4), Executable()], "in a pickle that may hold only ints"),
        ({}, "EMPTY_DICT"),
        ([((0, 1.5), 4)], "BINFLOAT"),
        ((((0, 1), 4),), "holds tuple"),
        ([((0, 1), 4), ((0,), 5)], "merge 1 is not"),
        ([((0, -1), 4)], "merge 0 is not"),
        ([((0, 2**70), 4)], "merge 0 is not"),
        ([((0, 1), 5)], "merge 0 makes token 5, expected 4"),
        ([((0, 9), 4)], "merge 0: b = 9 is not an earlier token"),
        ([((0, 1), 4), ((0, 1), 5)], "merge 1: the same merge"),
    ],
)
def test_published_files_that_are_something_else(content, message, tmp_path):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(VocabularyError, match=message) as refusal:
        VisualBPE.load_published(path, 4)
    assert str(path) in str(refusal.value)
    path.write_bytes(pickle.dumps([((0, 1), 4)])[:-3])
    with pytest.raises(VocabularyError, match="not a pickled list"):
        VisualBPE.load_published(path, 4)
