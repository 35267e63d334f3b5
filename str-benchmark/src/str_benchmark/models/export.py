"""ONNX export of every combination, with a dynamic batch."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from str_benchmark.models.inference import fold_batch_norm
from str_benchmark.models.recognizer import Recognizer

OPSET = 17  # grid_sample came with 16


def export_onnx(model: Recognizer, path: Path | str) -> None:
    """Write the reading network (batch norm folded; attention greedy, all steps) as ONNX.

    Input "images" (B, C, H, W) float32 in [-1, 1], output "logits" as the model's, B free, and W
    where the network takes any. PyTorch's tracing exporter
    is used: it needs the package onnx alone, and takes a second where the newer one takes ten.

    Raises:
        RuntimeError: onnx is not installed.
    """
    if find_spec("onnx") is None:
        raise RuntimeError("ONNX export needs the package onnx: install str-benchmark[export]")
    model = fold_batch_norm(model).cpu()
    config = model.config
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    if config.variable_width:
        axes = {"images": {0: "batch", 3: "width"}, "logits": {0: "batch", 1: "columns"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks of shapes are traced as constants
        torch.onnx.export(
            model,
            (torch.zeros(2, config.in_channels, *config.img_size),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
