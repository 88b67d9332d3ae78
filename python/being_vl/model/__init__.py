"""Expanding a language model by the shared vocabulary, and asking it about images."""

from typing import TYPE_CHECKING

from being_vl.lazy import lazy_names

if TYPE_CHECKING:
    from being_vl.model.assistant import Assistant
    from being_vl.model.options import ExpandOptions, GenerateOptions
    from being_vl.model.processor import BeingVLProcessor

__all__ = ["Assistant", "BeingVLProcessor", "ExpandOptions", "GenerateOptions"]
_MODULES = {
    "assistant": ["Assistant"],
    "options": ["ExpandOptions", "GenerateOptions"],
    "processor": ["BeingVLProcessor"],
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
