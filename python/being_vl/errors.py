"""The errors that being-vl raises on bad input; all are `ValueError`s.

Each message says what was expected, what came, and where (file, record, grid, index). The command line prints
them as one line and exits with 2.
"""

from being_vl._core import BeingVLError, GridError, VocabularyError

__all__ = [
    "BeingVLError",
    "CheckpointError",
    "ConfigError",
    "FingerprintError",
    "GridError",
    "ImageError",
    "ManifestError",
    "ModelError",
    "OutputError",
    "QuantizerError",
    "RecordError",
    "TrainingError",
    "VocabularyError",
]


class ConfigError(BeingVLError):
    """An option or recipe that cannot be carried out."""


class ManifestError(BeingVLError):
    """A step's output folder that is missing, unfinished or damaged."""


class OutputError(BeingVLError):
    """A place that a command must not write to, or where it cannot."""


class FingerprintError(BeingVLError):
    """An output that was made with other options or inputs than a job has now."""


class ImageError(BeingVLError):
    """Images that are missing or cannot be read."""


class QuantizerError(BeingVLError):
    """A quantizer that cannot be loaded, or grids, vocabulary and model of different quantizers."""


class RecordError(BeingVLError):
    """A record or a file of records that cannot be turned into a training sequence.

    Args:
        message: What is wrong, and where.
        kind: The kind of fault, as reports count it.
    """

    def __init__(self, message: str, kind: str = "malformed record") -> None:
        super().__init__(message)
        self.kind = kind


class ModelError(BeingVLError):
    """A language model that cannot be expanded, trained or asked."""


class CheckpointError(BeingVLError):
    """A training checkpoint that is damaged."""


class TrainingError(BeingVLError):
    """Training that must not go on as it is: a loss or gradient that is not finite or far from what it was."""
