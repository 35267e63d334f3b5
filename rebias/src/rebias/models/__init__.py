"""Networks; each one's `forward` gives (logits, features)."""

from rebias.models.bagnet import BagNet18
from rebias.models.convnet import SimpleConvNet
from rebias.models.mlp import MLP
from rebias.models.network import Network
from rebias.models.nglcm import NGLCM, HexNet
from rebias.models.receptive_field import receptive_field
from rebias.models.resnet import ResNet18
from rebias.models.resnet3d import ResNet3D

__all__ = ["MLP", "NGLCM", "BagNet18", "HexNet", "Network", "ResNet18", "ResNet3D", "SimpleConvNet", "receptive_field"]
