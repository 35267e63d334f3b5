"""What a recognizer costs: FLOPs (our addition; the paper has time and parameters)."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from str_benchmark.models.recognizer import Recognizer


def gflops(model: Recognizer) -> float:
    """Operations for one image in 1e9, two per multiply-add, of convolutions, matrix products and LSTMs.

    The attention head takes all its steps. PyTorch's counter does not look into LSTM kernels: theirs are added here.
    """
    config, device = model.config, next(model.parameters()).device
    image = torch.zeros(1, config.in_channels, *config.img_size, device=device)
    training = model.training
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        columns = model.FeatureExtraction(model.Transformation(image)).mean(2).transpose(1, 2)
        recurrent = 0
        for layer in model.SequenceModeling.children():
            recurrent += _lstm_flops(layer.rnn, columns.shape[1])
            columns = layer.linear(columns.new_zeros(1, columns.shape[1], 2 * layer.rnn.hidden_size))
        model.Prediction(columns.contiguous())
    model.train(training)
    return (counter.get_total_flops() + recurrent) / 1e9


def _lstm_flops(rnn: nn.LSTM, steps: int) -> int:
    """Two directions, four gates, input and state."""
    return 2 * steps * 2 * 4 * rnn.hidden_size * (rnn.input_size + rnn.hidden_size)
