"""SAR and FAN, the paper's rivals, as in the official repository."""

import pytest
import torch
from torch.nn import functional as F

from satrn.config import SATRNConfig, preset
from satrn.models import SATRN
from satrn.models.cnn import ResNet31
from satrn.models.fan import ColumnEncoder

SMALL = dict(d_model=8, heads=2, ffn=8, enc_layers=1, dec_layers=1, img_size=(12, 20), charset="abc", max_length=4)
FAN = dict(encoder="fan", decoder="fan", d_model=16, img_size=(32, 24))


def test_sar_is_its_equations_and_reads_its_columns_to_the_last():
    """One step by hand; the holistic vector is the bidirectional LSTM's output behind the last column."""
    torch.manual_seed(0)
    model = SATRN(SATRNConfig(**SMALL, decoder="lstm")).double().eval()
    sar, memory = model.decoder, torch.randn(2, 15, 8, dtype=torch.float64)
    columns = memory.view(2, 3, 5, 8).amax(dim=1)
    outputs, (last, _) = sar.holistic(columns)
    forwards = last[0]  # the forward half has seen all columns, the backward half only the last one
    torch.testing.assert_close(outputs[:, -1, :4], forwards)
    assert not torch.allclose(outputs[:, 0, :4], forwards)
    holistic = sar.holistic_fc(outputs[:, -1])
    keys = sar.key(memory.view(2, 3, 5, 8).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 15, 8)

    def attend(hidden, cell):
        energy = torch.tanh(keys + (torch.cat([cell, hidden], 1) @ sar.query.weight.T)[:, None])
        weights = (energy @ sar.energy.weight[0]).softmax(dim=1)
        return (weights[..., None] * memory).sum(dim=1), weights

    state = sar.start(memory, (3, 5))
    torch.testing.assert_close(state.hidden, holistic)
    torch.testing.assert_close(state.glimpse, attend(holistic, holistic)[0])
    previous = torch.tensor([model.cfg.classes, 2])
    inputs = sar.input_fc(torch.cat([torch.eye(model.cfg.classes + 1).double()[previous], state.glimpse], 1))
    hidden, cell = sar.reader(inputs, (holistic, holistic))
    glimpse, weights = attend(hidden, cell)
    wanted = sar.classifier(torch.relu(sar.output_fc(torch.cat([hidden, glimpse], 1))))
    logits, after = sar.step(previous, state)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(after.attention, weights)


@pytest.mark.parametrize("kind", ({}, {"decoder": "lstm"}, FAN), ids=str)
def test_it_reads_under_autocast_in_bfloat16(kind):
    """Not every CPU has an LSTM in bfloat16: SAR's and FAN's stay in float32."""
    model = SATRN(SATRNConfig(**SMALL | kind)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(3, 1, *model.cfg.img_size) - 0.5, torch.zeros(3, 2, dtype=torch.long)).isfinite().all()


def columns(model, images):
    """FAN's map of one row as [B, W', d]."""
    encoded = model.encode(images)
    assert encoded.hw == (1, encoded.tokens.shape[1])
    return encoded.tokens


def test_fan_reads_by_its_equations():
    """Two steps by hand, from zeros: what the attention saw after the first enters the second."""
    torch.manual_seed(0)
    model = SATRN(SATRNConfig(**SMALL | FAN)).double().eval()
    fan, memory = model.decoder, torch.randn(2, 7, 16, dtype=torch.float64)
    keys = memory @ fan.key.weight.T
    hidden, cell, glimpse = torch.zeros(2, 8).double(), torch.zeros(2, 8).double(), torch.zeros(2, 16).double()
    state = fan.start(memory, (1, 7))
    for previous in (torch.full((2,), model.cfg.classes), torch.tensor([2, 3])):
        character = torch.eye(model.cfg.classes + 1).double()[previous]
        hidden, cell = fan.reader(fan.input_fc(torch.cat([character, glimpse], dim=1)), (hidden, cell))
        query = torch.cat([cell, hidden], dim=1) @ fan.query.weight.T + fan.query.bias
        weights = (torch.tanh(keys + query[:, None]) @ fan.energy.weight[0]).softmax(dim=1)
        glimpse = (weights[..., None] * memory).sum(dim=1)
        wanted = fan.classifier(fan.output_fc(torch.cat([hidden, glimpse], dim=1)))  # no ReLU, unlike SAR's
        logits, state = fan.step(previous, state)
        torch.testing.assert_close(logits, wanted)
        torch.testing.assert_close(state.attention, weights)
    assert (fan.output_fc.out_features, fan.query.bias is None) == (8, False)


def test_fan_s_columns_are_26_of_a_word_and_both_directions_reach_each():
    torch.manual_seed(0)
    model = SATRN(SATRNConfig(**SMALL | FAN | dict(img_size=(32, 100)))).eval()
    images = torch.rand(1, 1, 32, 100) - 0.5
    seen = columns(model, images)
    assert seen.shape == (1, 26, 16)
    cnn = model.backbone
    row = cnn.layers(images)
    assert row.shape == (1, 16, 1, 26)
    torch.testing.assert_close(seen, cnn.rnn(row[:, :, 0].transpose(1, 2))[0])
    tall = torch.rand(1, 1, 64, 64) - 0.5
    rows = cnn.layers(tall)
    assert rows.shape == (1, 16, 3, 17)
    torch.testing.assert_close(cnn(tall)[:, :, 0].transpose(1, 2), cnn.rnn(rows.mean(dim=2).transpose(1, 2))[0])


@pytest.mark.parametrize("network, blocks", ((ResNet31, (1, 2, 5, 3)), (ColumnEncoder, (1, 2, 5, 3))))
def test_each_stage_starts_with_a_projected_shortcut(network, blocks):
    """Also where the number of channels stays the same; with batch norm and ReLU, as in the official repository."""
    torch.manual_seed(0)
    stages, last = [], False
    cnn = network(1, 32).eval()
    for layer in cnn.layers:
        if hasattr(layer, "shortcut"):
            projected = len(list(layer.shortcut.parameters())) > 0
            stages = [*stages, 1] if projected else [*stages[:-1], stages[-1] + 1]
            last = layer
    assert tuple(stages) == blocks
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(last(x), F.relu(x + last.bn2(last.conv2(last.conv1(x)))))
    first = next(layer for layer in cnn.layers if hasattr(layer, "shortcut"))
    assert (first.shortcut(torch.randn(2, first.shortcut.conv.in_channels, 4, 4)) >= 0).all()


def stage(channels_in, channels, blocks):
    """Weights of a stage's 3x3 convolutions and of its one projection."""
    return 9 * channels * (channels_in + (2 * blocks - 1) * channels) + channels_in * channels


def test_fan_has_the_official_channels():
    encoder = SATRN(preset("big", encoder="fan", decoder="fan")).backbone
    found = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    residual = stage(64, 128, 1) + stage(128, 256, 2) + stage(256, 512, 5) + stage(512, 512, 3)
    between = 9 * (32 + 32 * 64 + 128**2 + 256**2 + 512**2) + 2 * 4 * 512**2
    assert found == residual + between
    assert sum(p.numel() for p in encoder.rnn.parameters()) == 2 * 4 * 256 * (512 + 256 + 2)  # two biases each


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(img_size=(28, 100)), "encoder='fan' needs images at least 32 pixels high, got 28"),
        (dict(d_model=24), "encoder='fan' needs d_model divisible by 16, got 24"),
    ),
    ids=str,
)
def test_sizes_that_fan_cannot_take_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SATRNConfig(**SMALL | FAN | change)
