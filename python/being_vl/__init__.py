"""Visual BPE, and the training of language models that read images as tokens.

`import being_vl` needs numpy alone; torch, transformers and DeepSpeed are imported by the parts that use them.
"""

from being_vl.tokenizer import EncodedBatch, VisualBPE

__all__ = ["EncodedBatch", "VisualBPE"]
