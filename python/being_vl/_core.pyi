"""The Rust core. `being_vl.VisualBPE` is its public face."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["BeingVLError", "GridError", "Vocabulary", "VocabularyError"]

class BeingVLError(ValueError): ...
class GridError(BeingVLError): ...
class VocabularyError(BeingVLError): ...

@final
class Vocabulary:
    @staticmethod
    def train(
        grids: object,
        *,
        base_vocab_size: int,
        num_merges: int,
        merge_mode: str,
        alpha: float,
        sigma: float,
        min_frequency: int,
        num_threads: int,
        progress: Callable[[dict[str, Any]], object] | None,
        resume: Vocabulary | None,
        checkpoint: Callable[[Vocabulary], object] | None,
        checkpoint_every: int,
        quantizer_name: str | None,
        quantizer_fingerprint: str | None,
    ) -> Vocabulary: ...
    @staticmethod
    def from_json(text: str, /) -> Vocabulary: ...
    def to_json(self) -> str: ...
    def encode(
        self, grid: ArrayLike, *, regions: bool, dropout: float, seed: int
    ) -> tuple[NDArray[np.uint32], tuple[NDArray[np.int32], NDArray[np.int32]] | None]: ...
    def encode_batch(
        self,
        grids: ArrayLike | Iterable[ArrayLike],
        *,
        num_threads: int,
        regions: bool,
        dropout: float,
        seed: int,
    ) -> tuple[
        NDArray[np.uint32], NDArray[np.int64], list[tuple[NDArray[np.int32], NDArray[np.int32]]] | None
    ]: ...
    def decode(
        self, ids: ArrayLike, height: int, width: int, *, regions: tuple[ArrayLike, ArrayLike] | None
    ) -> NDArray[np.uint32]: ...
    def token_to_cells(self, token: int, /) -> list[tuple[int, int, int]]: ...
    def merges(self) -> list[tuple[int, int, int | None, int | None, int, int, float]]: ...
    def grid_sizes(self) -> list[tuple[int, int, int]]: ...
    @property
    def base_vocab_size(self) -> int: ...
    @property
    def num_merges(self) -> int: ...
    @property
    def merge_mode(self) -> Literal["pair", "oriented"]: ...
    @property
    def alpha(self) -> float: ...
    @property
    def sigma(self) -> float: ...
    @property
    def min_frequency(self) -> int: ...
    @property
    def quantizer_name(self) -> str | None: ...
    @property
    def quantizer_fingerprint(self) -> str | None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
