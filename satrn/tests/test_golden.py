"""The network against MMOCR's modules, first-principles tables and the counts of both public codes."""

import json

import numpy as np
import pytest
import torch

from satrn.complexity import costs
from satrn.config import SATRNConfig, preset
from satrn.laff import LocalityAwareFeedForward
from satrn.models.cnn import ShallowCNN
from satrn.models.decoder import DecoderLayer
from satrn.models.encoder import Encoder, EncoderLayer
from satrn.models.satrn import SATRN
from satrn.positional import AdaptivePositionalEncoding2D, sinusoid
from satrn.pretrained import _our_name, _our_shape

CFG = SATRNConfig(variant="mmocr", d_model=32, ffn=64, heads=4, enc_layers=2, dec_layers=1, img_size=(16, 40))
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def oracle(golden):
    return {name: torch.from_numpy(value) for name, value in np.load(golden / "modules_small.npz").items()}


def load(module, oracle, name):
    """MMOCR's weights by name; the oracles' LayerNorms have eps 1e-5."""
    weights = {k.split("/w/")[1]: v for k, v in oracle.items() if k.startswith(f"{name}/w/")}
    ours = {_our_name(k): _our_shape(k, v) for k, v in weights.items()}
    missing, unexpected = module.load_state_dict(ours, strict=False)
    assert not unexpected and all("num_batches_tracked" in key for key in missing)
    return module.eval()


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
@pytest.mark.parametrize("n, d", [(8, 64), (25, 128), (4, 8)])
def test_sinusoids(golden, layout, n, d):
    table = np.load(golden / "sinusoid_tables.npz")[f"{layout}_{n}x{d}"]
    np.testing.assert_allclose(sinusoid(n, d, layout).numpy(), table, atol=1e-6, rtol=0)


def test_shallow_cnn(oracle):
    module = load(ShallowCNN(1, 32), oracle, "cnn")
    torch.testing.assert_close(module(oracle["cnn/in"]), oracle["cnn/out"], **CLOSE)


def test_a2dpe(oracle):
    module = load(AdaptivePositionalEncoding2D(32, hidden=32, bias=True), oracle, "a2dpe")
    out, alpha, beta = module(oracle["a2dpe/in"])
    for ours, name in ((out, "out"), (alpha, "alpha"), (beta, "beta")):
        torch.testing.assert_close(ours, oracle[f"a2dpe/{name}"], **CLOSE)


def test_laff(oracle):
    module = load(LocalityAwareFeedForward(32, 64), oracle, "laff")
    torch.testing.assert_close(module(oracle["laff/in"]), oracle["laff/out"], **CLOSE)


def test_encoder_layer_keeps_rows_and_columns(oracle):
    module = load(EncoderLayer(CFG), oracle, "enc_layer")
    torch.testing.assert_close(module(oracle["enc_layer/in"], (3, 5)), oracle["enc_layer/out"], **CLOSE)
    assert not torch.allclose(module(oracle["enc_layer/in"], (5, 3)), oracle["enc_layer/out"], **CLOSE)


def test_encoder(oracle):
    module = load(Encoder(CFG), oracle, "encoder")
    encoded = module(oracle["encoder/in"])
    torch.testing.assert_close(encoded.tokens, oracle["encoder/out"], **CLOSE)
    assert encoded.hw == (4, 10)


def test_decoder_layer_at_once_and_step_by_step(oracle):
    module = load(DecoderLayer(CFG), oracle, "dec_layer")
    x, memory, wanted = (oracle[f"dec_layer/{name}"] for name in ("in", "memory", "out"))
    torch.testing.assert_close(module(x, memory), wanted, **CLOSE)
    past, cross = None, module.enc_attn.keys_values(memory)
    for position in range(x.shape[1]):
        out, past, _ = module.step(x[:, position : position + 1], past, cross)
        torch.testing.assert_close(out[:, 0], wanted[:, position], **CLOSE)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_part(golden):
    for entry in json.loads((golden / "param_counts.json").read_text()):
        sizes = dict(
            d_model=entry["d_model"], ffn=entry["d_inner"], enc_layers=entry["enc_layers"], heads=entry["heads"],
            dec_layers=entry["dec_layers"], in_channels=entry["in_channels"],
        )  # fmt: skip
        with torch.device("meta"):
            official, mmocr = (SATRN(SATRNConfig(variant=variant, **sizes)) for variant in ("official", "mmocr"))
        assert count(official) == entry["total_official_tf(charset 94+EOS+UNK, shared embedding 97 rows)"]
        assert count(official.backbone) == entry["shallow_cnn"]
        assert count(official.encoder.position_enc) == entry["a2dpe_official_tf(shared d->d/2 then ->2d)"]
        assert count(official.encoder.layer_stack[0]) == entry["encoder_layer_official_tf"]
        assert count(official.encoder.layer_stack[0].attn) == entry["attention_official_tf(q,k d/4; biased)"]
        assert count(official.decoder.layer_stack[0]) == entry["decoder_layer_official_tf"]
        assert count(mmocr.encoder.position_enc) == entry["a2dpe_mmocr(two conv per axis)"]
        assert count(mmocr.encoder.layer_stack[0]) == entry["encoder_layer_mmocr"]
        assert count(mmocr.decoder.layer_stack[0]) == entry["decoder_layer_mmocr"]


SIZES = {"big": 55_657_728, "middle": 14_033_536, "small-9": 9_354_496, "small": 7_243_648}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_paper_s_sizes(size):
    assert costs(preset(size)).parameters == SIZES[size]
    d = preset(size).d_model
    assert costs(preset(size, variant="official")).parameters == SIZES[size] - d * d // 2 + 5 * d // 2


@pytest.mark.parametrize("size, billions", [("big", 35.9), ("middle", 9.0), ("small", 4.7)])
def test_flops_are_the_printed_ones(size, billions):
    counted = costs(preset(size))
    assert counted.flops == pytest.approx(billions * 1e9, rel=0.01)
    assert counted.flops_kept < 0.51 * billions * 1e9


def test_flops_by_hand():
    """One encoder layer, one decoder layer, one step: the card's closed forms for convolutions and dense layers."""
    cfg = SATRNConfig(d_model=32, heads=4, ffn=64, enc_layers=1, dec_layers=1, max_length=1, pos="none", charset="ab")
    d, f, tokens, classes = 32, 64, 200, 4
    cnn = 9 * (d // 2) * 32 * 100 + 9 * (d // 2) * d * 16 * 50
    encoder = tokens * (2.5 * d * d + 2 * d * f + 9 * f)
    decoder = 2.5 * d * d + (1.25 * d * d + tokens * 1.25 * d * d) + 2 * d * f + classes * d
    assert costs(cfg).flops == 2 * (cnn + encoder + decoder)
