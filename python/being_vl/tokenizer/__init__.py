"""The visual BPE tokenizer. `VisualBPE` needs numpy alone; learning from files and encoding folders needs pyarrow."""

from being_vl.tokenizer.batch import EncodedBatch, Regions
from being_vl.tokenizer.visual_bpe import MergeInfo, VisualBPE

__all__ = ["EncodedBatch", "MergeInfo", "Regions", "VisualBPE"]
