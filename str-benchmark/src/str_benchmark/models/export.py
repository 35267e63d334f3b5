"""ONNX export of every combination, with a dynamic batch; and reading by ONNX Runtime."""

from __future__ import annotations

import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from str_benchmark.models.inference import fold_batch_norm
from str_benchmark.models.recognizer import Recognizer

OPSET = 17  # grid_sample came with 16


def export_onnx(model: Recognizer, path: Path | str) -> None:
    """Write the reading network (batch norm folded; attention greedy, all steps) as ONNX.

    Input "images" (B, C, H, W) float32 in [-1, 1], output "logits" as the model's, B free, and W if the network
    accepts any width. Uses PyTorch's tracing exporter: it needs only the package onnx, and takes one second instead of
    the newer exporter's ten.

    Raises:
        RuntimeError: onnx is not installed.
    """
    if find_spec("onnx") is None:
        raise RuntimeError("ONNX export needs the package onnx: pip install 'str-benchmark[export]'")
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


class OnnxRecognizer(Recognizer):
    """A recognizer whose network runs in ONNX Runtime on the CPU, with as many threads as torch has.

    It is made from this project's own export. Attention runs all its steps, since an export cannot stop early.

    Raises:
        RuntimeError: onnx or onnxruntime is not installed.
    """

    def __init__(self, model: Recognizer):
        nn.Module.__init__(self)  # there are no parameters here
        if find_spec("onnxruntime") is None:
            raise RuntimeError("engine onnxruntime needs that package: pip install 'str-benchmark[export]'")
        import onnxruntime

        self.config, self.tokenizer = model.config, model.tokenizer
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads do not slow other work
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "model.onnx")
            network = (Path(folder) / "model.onnx").read_bytes()
        self._session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def forward(self, images: Tensor, targets: Tensor | None = None, early_stop: bool = False) -> Tensor:
        """Logits of images (B, C, H, W); targets would be for training."""
        if targets is not None:
            raise ValueError("targets: ONNX Runtime can only read; train the network itself")
        return torch.from_numpy(self._session.run(None, {"images": images.numpy()})[0])
