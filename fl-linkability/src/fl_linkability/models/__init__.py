"""Networks for the federation's tasks. MobileNetV2 is imported where it is used: torchvision is slow."""

from torch import nn

from fl_linkability.data.bundle import FederatedBundle
from fl_linkability.models.cnn import CNN
from fl_linkability.models.lstm import TextLSTM
from fl_linkability.models.mlp import MLP, Head
from fl_linkability.settings import Settings

__all__ = ["CNN", "MLP", "Head", "TextLSTM", "build_model"]


def build_model(settings: Settings, bundle: FederatedBundle) -> nn.Module:
    """The network of the settings, with as many inputs and outputs as the data have."""
    if settings.model == "mlp":
        return MLP(bundle.users.x[0].numel(), settings.hidden, bundle.n_classes)
    if settings.model == "mobilenet-head":
        return Head(bundle.users.x[0].numel(), bundle.n_classes)
    if settings.model == "cnn":
        return CNN(settings.side, settings.hidden, bundle.n_classes)
    if settings.model == "lstm":
        return TextLSTM(bundle.vocabulary, settings.embedding, settings.hidden, next_word=bundle.task == "words")
    from fl_linkability.models.mobilenet import MobileNetV2

    return MobileNetV2(bundle.n_classes, settings.pretrained, settings.bn)
