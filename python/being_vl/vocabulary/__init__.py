"""The commands `being-vl vocab ...`: learn a visual BPE vocabulary from grids, import it, look at it."""

from being_vl.vocabulary.options import VocabOptions
from being_vl.vocabulary.training import train_vocabulary

__all__ = ["VocabOptions", "train_vocabulary"]
