"""Vocabularies learned from 40 of the photographs, in both modes."""

import pytest

from being_vl import VisualBPE
from helpers.photos import PHOTOS, PHOTOS_K

MODES = ("pair", "oriented")


@pytest.fixture(scope="session")
def vocabularies():
    return {mode: VisualBPE.train(PHOTOS[:40], PHOTOS_K, 400, mode, num_threads=1) for mode in MODES}


@pytest.fixture(scope="session", params=MODES)
def bpe(request, vocabularies):
    return vocabularies[request.param]


@pytest.fixture(scope="session")
def pair_bpe(vocabularies):
    return vocabularies["pair"]


@pytest.fixture(scope="session")
def oriented_bpe(vocabularies):
    return vocabularies["oriented"]
