"""The visual BPE tokenizer; needs numpy alone."""

from being_vl.tokenizer.batch import EncodedBatch, Regions
from being_vl.tokenizer.visual_bpe import MergeInfo, VisualBPE

__all__ = ["EncodedBatch", "MergeInfo", "Regions", "VisualBPE"]
