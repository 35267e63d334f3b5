"""ONNX in two graphs: the encoder (with the decoder's keys and values of the map), and one step of the decoder.

Batch size, height and width are free. The encoder's metadata hold the whole configuration, alphabet included.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from satrn.charset import END, Tokenizer
from satrn.config import SATRNConfig
from satrn.decoding import Recognition
from satrn.models import SATRN
from satrn.models.decoder import Decoder

GRAPHS = ("encoder.onnx", "step.onnx")
METADATA = "satrn"  # key of the configuration


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
    """Write encoder.onnx and step.onnx and return their paths.

    Batch size and kept positions are free, and so are height and width, as multiples of the downsampling.

    Raises:
        ValueError: a network without the Transformer decoder.
        RuntimeError: onnx and onnxscript are not installed.
    """
    _transformer(model)
    try:
        import onnx
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
    batch, past, rows, columns, places = map(torch.export.Dim, ("batch", "past", "rows", "columns", "places"))
    sizes = {2: cfg.downsample[0] * rows, 3: cfg.downsample[1] * columns}
    encoder, step = (folder / name for name in GRAPHS)
    _write(EncoderGraph(model), (images,), encoder, ["images"], ["cross_keys", "cross_values"],
           ({0: batch} | sizes,))  # fmt: skip
    written = onnx.load(encoder)
    onnx.helper.set_model_props(written, {METADATA: json.dumps(asdict(cfg))})
    onnx.save(written, encoder)
    stacked, kept_shape = {1: batch, 3: places}, {1: batch, 3: past}
    _write(
        StepGraph(model), step_inputs, step,
        ["previous", "position", "keys", "values", "cross_keys", "cross_values"],
        ["logits", "new_keys", "new_values"],
        ({0: batch}, None, kept_shape, kept_shape, stacked, stacked),
    )  # fmt: skip
    return encoder, step


def _write(graph: nn.Module, inputs: tuple, path: Path, input_names: list, output_names: list, shapes: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(), inputs, str(path), input_names=input_names, output_names=output_names, dynamic_shapes=shapes,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


class OnnxReader:
    """What `export_onnx` wrote, read by ONNX Runtime on a CPU, without the network's code.

    Args:
        folder: with encoder.onnx and step.onnx.
        threads: of ONNX Runtime; 0: one per core.

    Raises:
        FileNotFoundError: a graph is missing.
        ValueError: an encoder that `export_onnx` did not write.
        RuntimeError: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, threads: int = 0):
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeError("reading ONNX graphs needs onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads do not slow other work
        for name in GRAPHS:
            if not (Path(folder) / name).is_file():
                raise FileNotFoundError(f"{Path(folder) / name}: no such graph; `satrn export` writes it")
        self.encoder, self.step = (
            onnxruntime.InferenceSession(Path(folder) / name, options, providers=["CPUExecutionProvider"])
            for name in GRAPHS
        )
        about = self.encoder.get_modelmeta().custom_metadata_map.get(METADATA)
        if about is None:
            raise ValueError(f"{Path(folder) / GRAPHS[0]}: has no alphabet inside; write it again with `satrn export`")
        saved: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(about).items()}
        self.cfg = SATRNConfig(**saved)
        self.tokenizer = Tokenizer(self.cfg.charset)

    def generate(self, images: Tensor, max_length: int | None = None) -> Recognition:
        """Greedy reading; arguments as those of `SATRN.generate`."""
        cfg = self.cfg
        cross = self.encoder.run(None, {"images": images.numpy()})
        shape = (cfg.dec_layers, len(images), cfg.heads, 0)
        kept = [np.zeros((*shape, width // cfg.heads), np.float32) for width in (cfg.qk, cfg.d_model)]
        previous = torch.full((len(images),), cfg.classes)
        ended = torch.zeros(len(images), dtype=torch.bool)
        ids, probabilities = [], []
        names = [each.name for each in self.step.get_inputs()]
        for position in range(cfg.max_length if max_length is None else max_length):
            inputs = [previous.numpy(), np.array([position]), *kept, *cross]
            logits, *kept = self.step.run(None, dict(zip(names, inputs, strict=True)))
            best, number = torch.from_numpy(logits).softmax(dim=-1).max(dim=-1)
            previous = number.masked_fill(ended, END)
            ids.append(previous)
            probabilities.append(best.masked_fill(ended, 1.0))
            ended = ended | (previous == END)
            if ended.all():
                break
        return Recognition.from_ids(self.tokenizer, torch.stack(ids, 1), torch.stack(probabilities, 1), None)
