"""The visual BPE tokenizer; needs numpy alone."""

from being_vl.tokenizer.visual_bpe import EncodedBatch, MergeInfo, Regions, VisualBPE

__all__ = ["EncodedBatch", "MergeInfo", "Regions", "VisualBPE"]
