"""From records and grids to token sequences with labels, and the curriculum that orders them."""

from typing import TYPE_CHECKING

from being_vl.lazy import lazy_names

if TYPE_CHECKING:
    from being_vl.data.curriculum import Curriculum
    from being_vl.data.options import LossOptions, PrepareOptions, RecordFile, SequenceOptions
    from being_vl.data.records import Record, Records, Turn
    from being_vl.data.sequences import RecordGroup, SequenceBuilder, TokenSequence
    from being_vl.data.store import PreparedSequences

__all__ = [
    "Curriculum",
    "LossOptions",
    "PrepareOptions",
    "PreparedSequences",
    "Record",
    "RecordFile",
    "RecordGroup",
    "Records",
    "SequenceBuilder",
    "SequenceOptions",
    "TokenSequence",
    "Turn",
]
_MODULES = {
    "curriculum": ["Curriculum"],
    "options": ["LossOptions", "PrepareOptions", "RecordFile", "SequenceOptions"],
    "records": ["Record", "Records", "Turn"],
    "sequences": ["RecordGroup", "SequenceBuilder", "TokenSequence"],
    "store": ["PreparedSequences"],
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
