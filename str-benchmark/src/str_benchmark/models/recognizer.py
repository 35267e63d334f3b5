"""The four stages in a row, and the factory of all 24 combinations (section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from str_benchmark.config import MIN_SIZE, STRConfig
from str_benchmark.models.attention import Attention
from str_benchmark.models.rcnn import RCNN
from str_benchmark.models.resnet import ResNet
from str_benchmark.models.sequence import BiLSTM
from str_benchmark.models.transformation import TPSTransformation
from str_benchmark.models.vgg import VGG
from str_benchmark.tokenizers import AttnTokenizer, CTCTokenizer, make_tokenizer

FEATURES = {"VGG": VGG, "RCNN": RCNN, "ResNet": ResNet}


class Recognizer(nn.Module):
    """A recognizer; keys of `state_dict()` are those of the public checkpoints.

    Call it with images (B, C, H, W) float in [-1, 1]. CTC: logits (B, T, K). Attention: logits (B, steps, K), teacher
    forced if `targets` (B, L+1) int64 are given (`AttnTokenizer.encode(...)[0][:, :-1]`), else greedy.
    """

    def __init__(self, config: STRConfig):
        super().__init__()
        self.config = config
        self.tokenizer: CTCTokenizer | AttnTokenizer = make_tokenizer(config.pred, config.charset)
        width, hidden, classes = config.output_channel, config.hidden_size, self.tokenizer.num_classes
        self.Transformation: nn.Module = nn.Identity()
        if config.trans == "TPS":
            self.Transformation = TPSTransformation(
                config.num_fiducial, config.img_size, config.in_channels, config.localization_channel
            )
        self.FeatureExtraction = FEATURES[config.feat](config.in_channels, width)
        self.SequenceModeling: nn.Module = nn.Identity()
        if config.seq == "BiLSTM":
            direct = config.pred == "CTC" and config.ctc_head == "paper"
            second = BiLSTM(hidden, hidden, None if direct else hidden)
            self.SequenceModeling = nn.Sequential(BiLSTM(width, hidden, hidden), second)
            width = 2 * hidden if direct else hidden
        if config.pred == "CTC":
            self.Prediction: nn.Module = nn.Linear(width, classes)
        else:
            self.Prediction = Attention(width, hidden, classes, config.max_length)

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return next(self.parameters()).device

    def forward(self, images: Tensor, targets: Tensor | None = None, early_stop: bool = False) -> Tensor:
        config = self.config
        height, width = config.img_size
        if config.variable_width and images.ndim == 4:
            width = max(int(images.shape[3]), MIN_SIZE[1])
        if images.ndim != 4 or images.shape[1:] != (config.in_channels, height, width):
            expected = f"(B, {config.in_channels}, {height}, {'any' if config.variable_width else width})"
            raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
        features = self.FeatureExtraction(self.Transformation(images))  # (B, C, 1, T)
        columns = features.mean(2).transpose(1, 2).contiguous()  # (B, T, C)
        columns = self.SequenceModeling(columns)
        if config.pred == "CTC":
            return self.Prediction(columns)
        return self.Prediction(columns, targets, early_stop)


@torch.no_grad()
def output_columns(model: Recognizer) -> int | None:
    """Output columns of a CTC head at the configured width; None for attention, whose steps are characters."""
    if model.config.pred != "CTC":
        return None
    training = model.training
    image = torch.zeros(1, model.config.in_channels, *model.config.img_size, device=model.device)
    columns = model.eval().FeatureExtraction(image).shape[3]
    model.train(training)
    return columns


def build_model(config: STRConfig | str, **changes: Any) -> Recognizer:
    """A recognizer with new weights: He-normal for every weight matrix, biases 0, batch norm 1 (section 4.1).

    Args:
        config: a configuration, or a name as for `STRConfig.from_name`.
        changes: fields of the configuration, if a name is given.
    """
    if isinstance(config, str):
        config = STRConfig.from_name(config, **changes)
    elif changes:
        raise TypeError("build_model: changes need a name; use dataclasses.replace on a configuration")
    model = Recognizer(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: Recognizer) -> None:
    for name, parameter in model.named_parameters():
        if "localization_fc2" in name:
            continue
        if parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # 1-D weights are batch norm's


def count_parameters(model: nn.Module) -> int:
    """Learnable parameters, the paper's measure of memory."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
