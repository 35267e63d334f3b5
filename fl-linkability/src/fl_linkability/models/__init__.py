"""Networks of the task that is learned in the federation. MobileNetV2 is imported where it is used: torchvision is slow."""

from fl_linkability.models.mlp import MLP

__all__ = ["MLP"]
