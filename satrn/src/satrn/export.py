"""ONNX in two graphs: the encoder (with the decoder's keys and values of the map), and one step of the decoder."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from satrn.models import SATRN
from satrn.models.decoder import Decoder


def _transformer(model: SATRN) -> Decoder:
    if not isinstance(model.decoder, Decoder):
        raise ValueError(f"export needs decoder='satrn', got {model.cfg.decoder!r}")
    return model.decoder


class EncoderGraph(nn.Module):
    """Images [B, C, H, W] to cross keys [layers, B, heads, T, d_k] and values [layers, B, heads, T, d_v]."""

    def __init__(self, model: SATRN):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.model.encode(images)
        pairs = _transformer(self.model).start(encoded.tokens, encoded.hw).cross_kv
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


class StepGraph(nn.Module):
    """One step: previous classes [B] at a position (int64 [1]), kept keys and values [layers, B, heads, P, width].

    P is the position: nothing is cached at the first step. Returns logits [B, K] and the cache of length P + 1.
    """

    table: Tensor  # positions [P, d]

    def __init__(self, model: SATRN):
        super().__init__()
        self.decoder = _transformer(model)
        self.register_buffer("table", self.decoder.positions(model.cfg.max_length), persistent=False)

    def forward(
        self, previous: Tensor, position: Tensor, keys: Tensor, values: Tensor, cross_keys: Tensor, cross_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.decoder.embed(previous[:, None], self.table[position])
        kept = []
        for i, layer in enumerate(self.decoder.layer_stack):
            x, now, _ = layer.step(x, (keys[i], values[i]), (cross_keys[i], cross_values[i]))
            kept.append(now)
        logits = self.decoder.classify(x[:, 0])
        return logits, torch.stack([k for k, _ in kept]), torch.stack([v for _, v in kept])


def export_onnx(model: SATRN, folder: Path) -> tuple[Path, Path]:
    """Write encoder.onnx and step.onnx (batch size and kept positions are free) and return their paths.

    Raises:
        ValueError: a network without the Transformer decoder.
        RuntimeError: onnx and onnxscript are not installed.
    """
    _transformer(model)
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError("ONNX export needs onnx and onnxscript: pip install 'satrn[export]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg, model = model.cfg, model.cpu().float().eval()
    images = torch.zeros(2, cfg.in_channels, *cfg.img_size)
    with torch.no_grad():
        cross = EncoderGraph(model)(images)
    kept = [torch.zeros(cfg.dec_layers, 2, cfg.heads, 3, width // cfg.heads) for width in (cfg.qk, cfg.d_model)]
    step_inputs = (torch.zeros(2, dtype=torch.long), torch.tensor([3]), *kept, *cross)
    batch, past = torch.export.Dim("batch"), torch.export.Dim("past")
    stacked = {1: batch}
    _write(EncoderGraph(model), (images,), folder / "encoder.onnx", ["images"], ["cross_keys", "cross_values"],
           ({0: batch},))  # fmt: skip
    _write(
        StepGraph(model), step_inputs, folder / "step.onnx",
        ["previous", "position", "keys", "values", "cross_keys", "cross_values"],
        ["logits", "new_keys", "new_values"],
        ({0: batch}, None, {1: batch, 3: past}, {1: batch, 3: past}, stacked, stacked),
    )  # fmt: skip
    return folder / "encoder.onnx", folder / "step.onnx"


def _write(graph: nn.Module, inputs: tuple, path: Path, input_names: list, output_names: list, shapes: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(), inputs, str(path), input_names=input_names, output_names=output_names, dynamic_shapes=shapes,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
