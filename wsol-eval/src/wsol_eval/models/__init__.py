"""Three backbones (and a small one) x six methods and the fully supervised FSL: `build_model`."""

from wsol_eval.models.build import ARCHITECTURES, METHODS, build_model
from wsol_eval.models.network import Network, WSOLNetwork

__all__ = ["ARCHITECTURES", "METHODS", "Network", "WSOLNetwork", "build_model"]
