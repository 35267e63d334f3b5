"""The factory, checkpoints of the public code, other alphabets, inference forms and export."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from str_benchmark import bench
from str_benchmark.config import COMBINATIONS, KNOWN_AS, STRConfig
from str_benchmark.models import build_model, count_parameters
from str_benchmark.models.cost import gflops
from str_benchmark.models.export import export_onnx
from str_benchmark.models.inference import fold_batch_norm, for_inference
from str_benchmark.models.pretrained import load_pretrained, read_weights
from str_benchmark.models.winograd import WinogradConv2d
from str_benchmark.reading import read_pixels
from str_benchmark.tokenizers import END

SMALL = {"output_channel": 32, "hidden_size": 16, "localization_channel": 16, "max_length": 4}
IMAGES = torch.rand(3, 1, 32, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_names():
    assert len(COMBINATIONS) == 24 and STRConfig.from_name("TRBA").name == "TPS-ResNet-BiLSTM-Attn"
    assert STRConfig() == STRConfig.from_name(KNOWN_AS["TRBA"])
    with pytest.raises(ValueError, match="unknown name 'TRBC'; did you mean 'TRBA'.*CRNN.*None-VGG-None-CTC"):
        STRConfig.from_name("TRBC")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trans": "STN"}, "trans: expected one of None, TPS, got 'STN'"),
        ({"ctc_head": "new"}, "ctc_head: expected one of released, paper"),
        ({"img_size": (16, 100)}, "img_size: expected"),
        ({"in_channels": 4}, "in_channels: expected 1 or 3"),
        ({"output_channel": 20}, "output_channel: expected a multiple of 16, got 20"),
        ({"num_fiducial": 5}, "num_fiducial: expected an even number of at least 4, got 5"),
        ({"charset": "aa"}, "each character once"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        STRConfig(**changes)


def test_wrong_images():
    with pytest.raises(ValueError, match=r"images: expected \(B, 1, 32, 100\), got \(2, 3, 32, 100\)"):
        build_model("CRNN", **SMALL)(torch.zeros(2, 3, 32, 100))


def test_the_paper_s_ctc_head_has_the_printed_parameters():
    for name, printed in (("CRNN", 8.33), ("GRCNN", 4.64), ("None-RCNN-BiLSTM-Attn", 5.46)):
        paper = count_parameters(build_model(name, ctc_head="paper"))
        assert round(paper / 1e6, 2) == printed
    assert count_parameters(build_model("CRNN")) - count_parameters(build_model("CRNN", ctc_head="paper")) == 121_856
    assert build_model("CRNN", ctc_head="paper", **SMALL)(IMAGES).shape == (3, 24, 37)


def test_initial_weights_are_he_normal_and_tps_starts_at_its_points():
    model = build_model("TRBA", **SMALL)
    weight = model.Prediction.attention_cell.rnn.weight_ih
    assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.1)
    assert not model.SequenceModeling[0].rnn.bias_ih_l0.any()
    points = model.Transformation.LocalizationNetwork(IMAGES)
    assert torch.equal(points[0], points[1]) and points[0, 0].tolist() == [-1, 0] and points[0, -1].tolist() == [1, 0]


# ---- checkpoints ---------------------------------------------------------------------------------------


def public_file(model, path):
    """As the public code saves: DataParallel's prefix, TPS's matrices inside."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    if model.config.trans == "TPS":
        grid = model.Transformation.GridGenerator
        state |= {f"module.Transformation.GridGenerator.{n}": getattr(grid, n) for n in ("inv_delta_C", "P_hat")}
    torch.save(state, path)
    return path


def test_public_checkpoints_load_at_any_width(tmp_path):
    model = build_model("TRBA", **SMALL).eval()
    path = public_file(model, tmp_path / "TRBA.pth")
    loaded = load_pretrained(path, model.config)
    assert torch.equal(loaded.model(IMAGES), model(IMAGES)) and loaded.new == ""
    wide = load_pretrained(path, STRConfig.from_name("TRBA", img_size=(32, 200), **SMALL)).model
    assert wide(torch.zeros(1, 1, 32, 200)).shape == (1, 5, 38)


@pytest.mark.parametrize("name", ["CRNN", "None-VGG-None-Attn", "None-VGG-BiLSTM-Attn"])
def test_rows_go_with_their_characters(tmp_path, name):
    model = build_model(name, charset="abcd", **SMALL).eval()
    path = public_file(model, tmp_path / "m.pth")
    loaded = load_pretrained(path, model.config, charset="dxa")
    assert (loaded.kept, loaded.new) == ("da", "x")
    specials = model.tokenizer.specials
    old = [*range(specials), specials + 3, specials + 0]
    new = [*range(specials), specials + 0, specials + 2]
    head = (lambda m: m.Prediction.weight) if name == "CRNN" else (lambda m: m.Prediction.generator.weight)
    assert torch.equal(head(loaded.model)[new], head(model)[old])
    if name != "CRNN":
        columns = [m.Prediction.attention_cell.rnn.weight_ih for m in (loaded.model, model)]
        context = columns[0].shape[1] - loaded.model.tokenizer.num_classes
        assert torch.equal(columns[0][:, :context], columns[1][:, :context])
        assert torch.equal(columns[0][:, context:][:, new], columns[1][:, context:][:, old])
    if name == "CRNN":  # the same characters get the same scores
        assert torch.allclose(loaded.model(IMAGES)[..., new], model(IMAGES)[..., old], atol=1e-6)


def test_wrong_checkpoints(tmp_path):
    path = public_file(build_model("CRNN", **SMALL), tmp_path / "crnn.pth")
    with pytest.raises(ValueError, match="not the weights of TPS-ResNet-BiLSTM-Attn .*is missing"):
        load_pretrained(path, STRConfig.from_name("TRBA", **SMALL))
    with pytest.raises(ValueError, match=r"Prediction.weight is \(37, 16\), expected \(95, 16\)"):
        load_pretrained(path, STRConfig.from_name("CRNN", charset="94", **SMALL))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "text.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pth")


# ---- inference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("combo", ["TPS-VGG-None-CTC", "TPS-RCNN-None-CTC", "TPS-ResNet-None-Attn"])
def test_folding_changes_nothing(combo, fill):
    model = fill(build_model(combo, **SMALL)).double()  # in float32 the sampling behind TPS magnifies rounding
    folded, images = fold_batch_norm(model), IMAGES.double()
    left = [name for name, module in folded.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all("BN_" in name for name in left) and bool(left) == ("RCNN" in combo)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(4, 26), (5, 7), (1, 1)])
def test_winograd_is_the_convolution(size):
    convolution = torch.nn.Conv2d(256, 32, 3, padding=1)
    assert WinogradConv2d.fits(convolution) and not WinogradConv2d.fits(torch.nn.Conv2d(256, 32, 3))
    images = torch.randn(2, 256, *size)
    with torch.inference_mode():
        torch.testing.assert_close(WinogradConv2d(convolution)(images), convolution(images), rtol=1e-4, atol=1e-5)


def test_wide_layers_take_winograd_on_a_cpu():
    model = build_model("None-ResNet-None-CTC", output_channel=256).eval()
    fast = for_inference(model)
    assert sum(isinstance(module, WinogradConv2d) for module in fast.modules()) == 16
    with torch.inference_mode():
        torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


def test_greedy_attention_is_the_plain_loop_and_stops_early():
    model = build_model("None-VGG-None-Attn", **SMALL | {"max_length": 9}).eval()
    columns = torch.randn(4, 26, 32)
    head = model.Prediction
    with torch.inference_mode():
        torch.testing.assert_close(head(columns), bench.plain_attention(head, columns), rtol=1e-4, atol=1e-4)
        head.generator.bias[END] += 1.5
        whole, short = head(columns), head(columns, early_stop=True)
    assert whole.shape[1] == 10
    torch.testing.assert_close(short, whole[:, : short.shape[1]])
    ended = (whole.argmax(-1) == END).int().cumsum(1).bool().all(0)
    assert short.shape[1] == (ended.int().argmax() + 1 if ended.any() else 10)
    assert model.tokenizer.decode(short.softmax(-1)) == model.tokenizer.decode(whole.softmax(-1))


def test_greedy_attention_goes_on_until_every_word_has_its_end():
    ends = torch.tensor([2, 5, 3])

    class Scripted(nn.Linear):
        step = 0

        def forward(self, state):
            self.step += 1
            return F.one_hot(torch.where(ends <= self.step, END, 2), self.out_features).float()

    head = build_model("None-VGG-None-Attn", **SMALL | {"max_length": 9}).Prediction
    head.generator = Scripted(head.generator.in_features, head.generator.out_features)
    columns = torch.randn(3, 26, head.inputs)
    assert head(columns, early_stop=True).shape[1] == 5 and head(columns).shape[1] == 10


@pytest.mark.parametrize("combo, changes", [("CRNN", {"variable_width": True}), ("TPS-VGG-None-Attn", {})])
def test_onnx_runtime_as_the_engine(combo, changes, monkeypatch):
    pytest.importorskip("onnxruntime")
    model = build_model(combo, **SMALL, **changes).eval()
    engine = for_inference(model, "onnxruntime")
    for images in (IMAGES, IMAGES[:1, :, :, :64] if changes else IMAGES[:1]):
        with torch.inference_mode():
            torch.testing.assert_close(engine(images, early_stop=True), model(images), rtol=1e-3, atol=1e-3)
    pixels = (255 * (IMAGES + 1) / 2).byte()
    assert read_pixels(engine, pixels)[0] == read_pixels(model, pixels)[0] and engine.device.type == "cpu"
    with pytest.raises(ValueError, match="can only read"):
        engine(IMAGES, torch.zeros(len(IMAGES), 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="engine: expected one of torch, onnxruntime, got 'tensorrt'"):
        for_inference(model, "tensorrt")
    monkeypatch.setattr("str_benchmark.models.export.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'str-benchmark\[export\]'"):
        for_inference(model, "onnxruntime")


def test_flops():
    assert gflops(build_model("TRBA")) == pytest.approx(10.58, rel=0.02)  # the reference, without its LSTM layers
    model = build_model("None-VGG-None-CTC", **SMALL)
    assert gflops(build_model("CRNN", **SMALL)) > gflops(model)


@pytest.mark.parametrize("combo", COMBINATIONS)
def test_onnx_says_the_same(combo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = build_model(combo, **SMALL).eval()
    export_onnx(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(model).double()
    for images in (IMAGES, IMAGES[:1]):
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            expected, truth = model(images).numpy(), exact(images.double()).numpy()
        assert logits.shape == expected.shape
        error, ours = np.abs(logits - truth).max(), np.abs(expected - truth).max()
        assert error <= 4 * ours + 1e-5 * np.abs(truth).max(), (error, ours)  # as near to float64 as PyTorch's float32
