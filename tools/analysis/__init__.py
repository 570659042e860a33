"""What a full fine-tuning changed, and how much of it one vector a layer can hold."""

from tools.analysis.alignment import Alignment, alignment_by_kind, learned_compressions, plot_alignment
from tools.analysis.extraction import Extraction, extract_adapter
from tools.analysis.updates import layer_kind, weight_updates

__all__ = [
    "Alignment",
    "Extraction",
    "alignment_by_kind",
    "extract_adapter",
    "layer_kind",
    "learned_compressions",
    "plot_alignment",
    "weight_updates",
]
