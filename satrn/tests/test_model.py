"""What must hold of the network whatever its weights are."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satrn.attention import MultiHeadAttention
from satrn.charset import END, IGNORED, Tokenizer
from satrn.config import SATRNConfig, preset
from satrn.decoding import Recognition, beam_search, greedy
from satrn.evaluate import aspect_ratios, group_by_ratio, line_jumps
from satrn.laff import LocalityAwareFeedForward
from satrn.models import SATRN
from satrn.positional import AdaptivePositionalEncoding2D, fixed_encoding, sinusoid

KINDS = [
    dict(), dict(variant="official"), dict(variant="mmocr"), dict(decoder="lstm"), dict(encoder="resnet"),
    dict(pos="none"), dict(pos="1d"), dict(pos="2d_concat", laff="conv"), dict(squash_height=True, laff="fc"),
    dict(downsample=(8, 4), pos_mlp="shared", pos_layout="halves"), dict(in_channels=3, qk_width=16),
    dict(encoder="fan", decoder="fan", img_size=(32, 24)),
]  # fmt: skip


def build(cfg, seed=0):
    torch.manual_seed(seed)
    model = SATRN(cfg).eval()
    if cfg.decoder == "satrn" and cfg.variant != "mmocr":
        with torch.no_grad():  # livelier readings than fresh weights give
            model.decoder.trg_word_emb.weight.mul_(2)
    return model


def pixels(cfg, batch=3, seed=1):
    return torch.rand(batch, cfg.in_channels, *cfg.img_size, generator=torch.Generator().manual_seed(seed)) - 0.5


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), half=st.integers(1, 20), layout=st.sampled_from(["interleaved", "halves"]))
def test_sinusoid_is_its_definition(n, half, layout):
    d, table = 2 * half, sinusoid(n, 2 * half, layout)
    for position, i in itertools.product((0, n // 2, n - 1), range(half)):
        exponent = 2 * i / d if layout == "interleaved" else i / max(half - 1, 1)
        angle = position / 10000**exponent
        places = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, half + i)
        assert table[position, places[0]] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, places[1]] == pytest.approx(math.cos(angle), abs=1e-6)


def test_a2dpe_is_equations_3_to_8():
    torch.manual_seed(0)
    module, x = AdaptivePositionalEncoding2D(8).double(), torch.randn(2, 8, 3, 5, dtype=torch.float64)
    out, alpha, beta = module(x)
    g = x.mean(dim=(2, 3))
    for gate, perceptron in ((alpha, module.h_scale), (beta, module.w_scale)):
        first, last = perceptron[0].weight, perceptron[3].weight
        torch.testing.assert_close(gate, torch.sigmoid(torch.relu(g @ first.T) @ last.T))
    for h, w in itertools.product(range(3), range(5)):
        p = alpha * sinusoid(3, 8)[h].double() + beta * sinusoid(5, 8)[w].double()
        torch.testing.assert_close(out[:, :, h, w], x[:, :, h, w] + p)
    assert not any(name.endswith("bias") for name, _ in module.named_parameters())


def test_fixed_encodings_tell_rows_and_columns():
    table = fixed_encoding("2d_concat", 8, 3, 5, "interleaved", torch.device("cpu"))
    for h, w in itertools.product(range(3), range(5)):
        torch.testing.assert_close(table[:, h, w], torch.cat([sinusoid(3, 4)[h], sinusoid(5, 4)[w]]))
    flat = fixed_encoding("1d", 8, 3, 5, "halves", torch.device("cpu"))
    torch.testing.assert_close(flat.flatten(1).T, sinusoid(15, 8, "halves"))  # row by row
    assert not fixed_encoding("none", 8, 3, 5, "interleaved", torch.device("cpu")).any()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), length=st.integers(1, 7), causal=st.booleans())
def test_attention_is_its_float64_definition(seed, length, causal):
    torch.manual_seed(seed)
    module = MultiHeadAttention(8, 2, 4, 0.7).double()
    assert all(linear.bias is not None for linear in module.children()), "biased unless told otherwise"
    x = torch.randn(2, length, 8, dtype=torch.float64)
    q, k, v = (f(x).view(2, length, 2, -1) for f in (module.linear_q, module.linear_k, module.linear_v))
    out = torch.zeros(2, length, 8, dtype=torch.float64)
    for b, head, i in itertools.product(range(2), range(2), range(length)):
        seen = i + 1 if causal else length
        weights = torch.softmax(torch.stack([0.7 * q[b, i, head] @ k[b, j, head] for j in range(seen)]), dim=0)
        out[b, i, 4 * head : 4 * head + 4] = sum(weights[j] * v[b, j, head] for j in range(seen))
    torch.testing.assert_close(module(x, causal=causal), module.fc(out))
    maps = module.weights(x, module.keys_values(x)[0])  # the mean over heads of softmax(0.7 q k), no mask
    wanted = torch.softmax(0.7 * torch.einsum("bihd,bjhd->bhij", q, k), dim=-1).mean(dim=1)
    torch.testing.assert_close(maps.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, weight", [("fc", 2), ("separable", 2), ("conv", 18)])
def test_laff_s_forms(kind, weight):
    module = LocalityAwareFeedForward(8, 16, kind).eval()
    convolutions = sum(p.numel() for name, p in module.named_parameters() if "conv.weight" in name)
    assert convolutions == weight * 8 * 16 + (9 * 16 if kind == "separable" else 0)
    x = torch.randn(1, 8, 5, 7)
    moved = x.clone()
    moved[:, :, 2, 3] += 1
    changed = (module(moved) != module(x)).any(dim=1)[0]
    reach = {"fc": 0, "separable": 1, "conv": 2}[kind]
    assert changed.nonzero().sub(torch.tensor([2, 3])).abs().max() <= reach
    assert changed.sum() <= (2 * reach + 1) ** 2 and (module(x) >= 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cached_greedy_is_uncached_and_beam_one_and_the_forward_pass(tiny, kind):
    cfg = tiny(**kind)
    model, x = build(cfg), pixels(cfg)
    with torch.no_grad():
        encoded = model.encode(x)
        ids, probabilities, _ = greedy(model.decoder, encoded, 6)
        slow_ids, slow_probabilities, _ = greedy(model.decoder, encoded, 6, cache=False)
        whole, _, _ = greedy(model.decoder, encoded, 6, early_stop=False)
        beam_ids, beam_probabilities = beam_search(model.decoder, encoded, 6, 1)
        logits = model(x, whole)
    assert torch.equal(ids, slow_ids) and torch.equal(ids, beam_ids)
    torch.testing.assert_close(probabilities, slow_probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probabilities, beam_probabilities, rtol=1e-4, atol=1e-6)
    assert torch.equal(whole[:, : ids.shape[1]], ids) and (whole[:, ids.shape[1] :] == END).all()
    behind = (whole == END).long().cumsum(1) - (whole == END).long() > 0
    assert torch.equal(logits.argmax(dim=-1)[~behind], whole[~behind])
    assert len(model.generate(x).texts) == 3


def test_beam_finds_the_best_word_of_all(tiny):
    cfg = tiny(charset="ab", max_length=3)
    model, x = build(cfg, seed=4), pixels(cfg, batch=2)
    with torch.no_grad():
        encoded = model.encode(x)
        ids, _ = beam_search(model.decoder, encoded, 3, 64)
        scores = {}
        for word in itertools.product(range(cfg.classes), repeat=3):
            end = word.index(END) + 1 if END in word else 3
            targets = torch.tensor([[*word[:end], *[IGNORED] * (3 - end)]]).expand(2, -1)
            steps = model.decode(encoded, targets).log_softmax(-1)[:, :end].gather(2, targets[:, :end, None])
            scores[word[:end]] = steps.sum(dim=(1, 2))
    for row in range(2):
        best = max(scores, key=lambda word: scores[word][row])
        found = tuple(ids[row].tolist())
        assert found[: len(best)] == best and set(found[len(best) :]) <= {END}


def test_targets_see_no_later_character(tiny):
    cfg = tiny()
    model, x = build(cfg), pixels(cfg, batch=1)
    first, second = torch.tensor([[2, 3, 4, 0]]), torch.tensor([[2, 3, 6, 5]])
    a, b = model(x, first), model(x, second)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3], b[:, 3])
    padded = torch.tensor([[2, 0, IGNORED, IGNORED]])
    torch.testing.assert_close(model(x, padded)[:, :2], model(x, torch.tensor([[2, 0, 5, 5]]))[:, :2])


def test_any_size_that_the_downsampling_divides(tiny):
    model = build(tiny())
    for size in ((32, 100), (64, 64), (8, 512), (4, 4)):
        encoded = model.encode(torch.rand(1, 1, *size) - 0.5)
        assert encoded.hw == (size[0] // 4, size[1] // 4) and encoded.tokens.shape[1] == encoded.hw[0] * encoded.hw[1]
        assert ((encoded.alpha > 0) & (encoded.alpha < 1)).all() and encoded.beta.shape == (1, 16)


def test_the_one_dimensional_control_differs_in_nothing_but_its_map(tiny):
    two, one = build(tiny()), build(tiny(squash_height=True))
    assert two.state_dict().keys() == one.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(two.state_dict().values(), one.state_dict().values(), strict=True))
    assert two.encode(pixels(two.cfg)).hw == (4, 6) and one.encode(pixels(one.cfg)).hw == (1, 6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bfloat16_has_no_nan(tiny, kind):
    cfg = tiny(**kind)
    model = build(cfg).to(torch.bfloat16)
    x = 100 * pixels(cfg).to(torch.bfloat16)
    assert model(x, torch.tensor([[2, 3, 0]]).expand(3, -1)).isfinite().all()
    read = model.generate(x, attention=True)
    assert all(math.isfinite(c) for c in read.confidence) and read.attention.isfinite().all()


def test_official_s_quirks(tiny):
    model = build(tiny(variant="official"))
    layer = model.encoder.layer_stack[0]
    x = torch.randn(1, 24, 16)
    before = layer(x, (4, 6))
    with torch.no_grad():
        layer.norm2.weight.mul_(3)
        model.decoder.trg_word_emb.weight[-1] = 7.0
    torch.testing.assert_close(layer(x, (4, 6)), before)  # its second norm is discarded
    assert model.cfg.attention_scale == pytest.approx(8**-0.5) and build(tiny()).cfg.attention_scale == 2**-0.5
    start = torch.tensor([[model.cfg.classes]])
    torch.testing.assert_close(model.decoder.embed(start, torch.zeros(1, 16)), torch.zeros(1, 1, 16))
    assert (model.decoder.layer_stack[0].mlp(torch.randn(9, 16)) >= 0).all()
    assert (build(tiny()).decoder.layer_stack[0].mlp(torch.randn(99, 16)) < 0).any()
    for kind, wanted in (("official", (1e-3, 0.01)), ("paper", (1e-5, 0.1)), ("mmocr", (1e-5, 0.1))):
        norms = [each for each in build(tiny(variant=kind)).modules() if isinstance(each, torch.nn.BatchNorm2d)]
        assert len(norms) == 8 and {(norm.eps, norm.momentum) for norm in norms} == {wanted}


def test_recompute_changes_neither_gradients_nor_statistics(tiny):
    results = []
    for recompute in (False, True):
        model = build(tiny(dropout=0.3)).train()
        model.encoder.recompute = recompute
        torch.manual_seed(5)
        model(pixels(model.cfg), torch.tensor([[2, 3, 0]]).expand(3, -1)).square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*gradients, *(b for n, b in model.named_buffers() if "running" in n)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_confidence_is_the_official_one():
    ids, probabilities = torch.tensor([[2, 3, 0, 0], [0, 0, 0, 0]]), torch.tensor([[0.5, 0.8, 0.1, 1], [0.3, 1, 1, 1]])
    read = Recognition.from_ids(Tokenizer("ab"), ids, probabilities, None)
    assert read.texts == ["ab", ""] and read.char_confidence[1] == []
    assert read.char_confidence[0] == pytest.approx([0.5, 0.8])
    assert read.confidence == pytest.approx([(0.5 * 0.8 * 0.1) ** (1 / 3), 0.3])


def test_attention_maps_and_reports(tiny):
    model = build(tiny())
    x = pixels(model.cfg)
    read = model.generate(x, attention=True)
    assert read.texts == model.generate(x).texts and read.attention.shape[2:] == (4, 6)
    torch.testing.assert_close(read.attention.sum(dim=(2, 3)), torch.ones(read.attention.shape[:2]))
    maps = torch.zeros(4, 3, 2)
    maps[[0, 1, 2, 3], [0, 0, 2, 2], [0, 1, 0, 1]] = 1.0
    assert line_jumps(maps, 4) == 1 and line_jumps(maps, 2) == 0
    images = (255 * (x + 0.5)).to(torch.uint8)
    encoded = model.encode(images.float() / 255 - 0.5)
    torch.testing.assert_close(aspect_ratios(model, images, 2), encoded.alpha.sum(1) / encoded.beta.sum(1))
    assert list(group_by_ratio([0.5, 0.6, 0.8, 0.9]).values()) == [1, 2, 1]
    with pytest.raises(ValueError, match="need pos='a2dpe', got 'none'"):
        aspect_ratios(build(tiny(pos="none")), images)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(heads=3), "heads must divide d_model and qk_width, got 3, 512 and 128"),
        (dict(heads=0), "heads, enc_layers and dec_layers must be at least 1, got 0, "),
        (dict(dec_layers=0), "heads, enc_layers and dec_layers must be at least 1, got 8, "),
        (dict(img_size=(30, 100)), "image height must be divisible by the downsampling 4, got 30"),
        (dict(img_size=(32, 0)), "image width must be divisible by the downsampling 4, got 0"),
        (dict(downsample=(3, 4)), "powers of two"),
        (dict(charset="abca"), "different characters, got 'a' twice"),
        (dict(charset=""), "different characters"),
        (dict(pos="3d"), "pos must be one of a2dpe, none, 1d, 2d_concat, got '3d'"),
        (dict(variant="tf"), "variant must be one of"),
        (dict(in_channels=2), "in_channels 1 or 3"),
    ],
)
def test_impossible_networks(changes, message):
    with pytest.raises(ValueError, match=message):
        SATRNConfig(**changes)


def test_wrong_images_and_arguments(tiny):
    model = build(tiny())
    with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\) with B > 0, got \(0, 1, 16, 24\)"):
        model.encode(torch.zeros(0, 1, 16, 24))
    with pytest.raises(ValueError, match=r"got \(2, 3, 16, 24\)"):
        model.generate(torch.zeros(2, 3, 16, 24))
    with pytest.raises(ValueError, match=r"divisible by \(4, 4\), got \(16, 23\)"):
        model.encode(torch.zeros(2, 1, 16, 23))
    with pytest.raises(TypeError, match="floating-point tensor, got torch.uint8"):
        model.encode(torch.zeros(2, 1, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="beam and max_length must be at least 1, got 0 and 6"):
        model.generate(torch.zeros(1, 1, 16, 24), beam=0)
    with pytest.raises(ValueError, match="attention needs beam=1"):
        model.generate(torch.zeros(1, 1, 16, 24), beam=2, attention=True)
    with pytest.raises(ValueError, match="size must be one of small, small-9, middle, big, got 'tiny'"):
        preset("tiny")
    with pytest.raises(ValueError, match="kind must be separable, conv or fc, got 'dense'"):
        LocalityAwareFeedForward(8, 16, "dense")
    with pytest.raises(ValueError, match="even d, got 'interleaved' and 7"):
        sinusoid(3, 7)
