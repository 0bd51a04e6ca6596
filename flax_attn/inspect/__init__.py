"""What a model attends to: its gates, their statistics, Grad-CAM, and pictures.

Each block sows its gates, which costs nothing unless they are read. ``attention_maps``
reads all gates of a model for one input and ``statistics`` says how far they are open.
``grad_cam`` says where the evidence for a class lies. ``overlay`` draws such a map over
its image, and ``plot`` all of them side by side.
"""

from flax_attn.inspect._figure import plot
from flax_attn.inspect._gates import attention_maps
from flax_attn.inspect._grad_cam import grad_cam
from flax_attn.inspect._pictures import color_map, colour_map, overlay
from flax_attn.inspect._statistics import GateStatistics, StatisticsTable, statistics

__all__ = [
    "GateStatistics",
    "StatisticsTable",
    "attention_maps",
    "color_map",
    "colour_map",
    "grad_cam",
    "overlay",
    "plot",
    "statistics",
]
