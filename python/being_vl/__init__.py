"""Visual BPE, and the training of language models that read images as tokens.

`import being_vl` needs numpy alone. Each name below is imported when it is first used, and with it torch, transformers
or DeepSpeed where its part needs them.
"""

from typing import TYPE_CHECKING

from being_vl.lazy import lazy_names

if TYPE_CHECKING:
    from being_vl.data.options import LossOptions, PrepareOptions, RecordFile, SequenceOptions
    from being_vl.data.prepare import prepare
    from being_vl.data.records import Record, Records, Turn
    from being_vl.data.sequences import SequenceBuilder, TokenSequence
    from being_vl.errors import BeingVLError
    from being_vl.layout import VocabularyLayout
    from being_vl.model.assistant import Assistant
    from being_vl.model.expand import expand
    from being_vl.model.options import ExpandOptions, GenerateOptions
    from being_vl.model.processor import BeingVLProcessor
    from being_vl.quantizer.base import Quantizer, load_quantizer
    from being_vl.quantizer.job import quantize
    from being_vl.quantizer.options import QuantizeOptions
    from being_vl.quantizer.training.options import QuantizerTrainOptions
    from being_vl.quantizer.training.trainer import train_quantizer
    from being_vl.shards.grids import Grids, GridStore
    from being_vl.tokenizer.batch import EncodedBatch, Regions
    from being_vl.tokenizer.encode import encode_grids
    from being_vl.tokenizer.options import EncodeOptions, VocabularyOptions
    from being_vl.tokenizer.train import train_vocabulary
    from being_vl.tokenizer.visual_bpe import MergeInfo, VisualBPE
    from being_vl.training.check import check
    from being_vl.training.engine import train
    from being_vl.training.options import (
        BatchOptions,
        CheckOptions,
        CheckpointOptions,
        LoggingOptions,
        LoraOptions,
        OptimizerOptions,
        PrecisionOptions,
        RetentionOptions,
        SpikeOptions,
        StageOptions,
        TrainOptions,
    )
    from being_vl.version import __version__

__all__ = [
    "Assistant",
    "BatchOptions",
    "BeingVLError",
    "BeingVLProcessor",
    "CheckOptions",
    "CheckpointOptions",
    "EncodeOptions",
    "EncodedBatch",
    "ExpandOptions",
    "GenerateOptions",
    "GridStore",
    "Grids",
    "LoggingOptions",
    "LoraOptions",
    "LossOptions",
    "MergeInfo",
    "OptimizerOptions",
    "PrecisionOptions",
    "PrepareOptions",
    "QuantizeOptions",
    "Quantizer",
    "QuantizerTrainOptions",
    "Record",
    "RecordFile",
    "Records",
    "Regions",
    "RetentionOptions",
    "SequenceBuilder",
    "SequenceOptions",
    "SpikeOptions",
    "StageOptions",
    "TokenSequence",
    "TrainOptions",
    "Turn",
    "VisualBPE",
    "VocabularyLayout",
    "VocabularyOptions",
    "__version__",
    "check",
    "encode_grids",
    "expand",
    "load_quantizer",
    "prepare",
    "quantize",
    "train",
    "train_quantizer",
    "train_vocabulary",
]
_MODULES = {
    "data.options": ["LossOptions", "PrepareOptions", "RecordFile", "SequenceOptions"],
    "data.prepare": ["prepare"],
    "data.records": ["Record", "Records", "Turn"],
    "data.sequences": ["SequenceBuilder", "TokenSequence"],
    "errors": ["BeingVLError"],
    "layout": ["VocabularyLayout"],
    "model.assistant": ["Assistant"],
    "model.expand": ["expand"],
    "model.options": ["ExpandOptions", "GenerateOptions"],
    "model.processor": ["BeingVLProcessor"],
    "quantizer.base": ["Quantizer", "load_quantizer"],
    "quantizer.job": ["quantize"],
    "quantizer.options": ["QuantizeOptions"],
    "quantizer.training.options": ["QuantizerTrainOptions"],
    "quantizer.training.trainer": ["train_quantizer"],
    "shards.grids": ["GridStore", "Grids"],
    "tokenizer.batch": ["EncodedBatch", "Regions"],
    "tokenizer.encode": ["encode_grids"],
    "tokenizer.options": ["EncodeOptions", "VocabularyOptions"],
    "tokenizer.train": ["train_vocabulary"],
    "tokenizer.visual_bpe": ["MergeInfo", "VisualBPE"],
    "training.check": ["check"],
    "training.engine": ["train"],
    "training.options": [
        "BatchOptions",
        "CheckOptions",
        "CheckpointOptions",
        "LoggingOptions",
        "LoraOptions",
        "OptimizerOptions",
        "PrecisionOptions",
        "RetentionOptions",
        "SpikeOptions",
        "StageOptions",
        "TrainOptions",
    ],
    "version": ["__version__"],
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
