"""Mixing: what every pixel and label must be, whatever the batch; and what is refused."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from cutmix_robustness import (
    CutMix,
    Cutout,
    DropBlock2d,
    ManifoldMix,
    Mixup,
    MixupCutMix,
    ShakeDrop,
    StochasticDepth,
    cutmix_box,
    mixed_cross_entropy,
    sample_boxes,
)
from cutmix_robustness.cutmix import box_lam, sample_lam, unmixed
from cutmix_robustness.networks import SmallNet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, height, width, dtype=torch.float32):
    """Image i holds i everywhere."""
    return torch.arange(n).to(dtype)[:, None, None, None].expand(n, 3, height, width).contiguous()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 9), height=st.integers(1, 40), width=st.integers(1, 90), seed=st.integers(0, 2**31),
    mode=st.sampled_from(["batch", "sample"]), rounding=st.sampled_from(["reference", "exact"]),
    partner=st.sampled_from(["permute", "roll", "flip"]), dtype=st.sampled_from([torch.float32, torch.uint8]),
    alpha=st.sampled_from([0.3, 1.0, 4.0]),
)  # fmt: skip
def test_every_pixel_is_one_of_two_and_the_label_counts_them(
    n, height, width, seed, mode, rounding, partner, dtype, alpha
):
    images = numbered(n, height, width, dtype)
    mix = CutMix(alpha, mode=mode, rounding=rounding, partner=partner, generator=generator(seed))
    batch = mix(images, torch.arange(n))
    assert batch.images.dtype == dtype and torch.equal(images, numbered(n, height, width, dtype))
    assert torch.equal(batch.target_b, batch.perm)
    for i in range(n):
        y1, x1, y2, x2 = batch.boxes[i].tolist()
        expected = images[i].clone()
        expected[:, y1:y2, x1:x2] = batch.perm[i].to(dtype)
        assert torch.equal(batch.images[i], expected)
        assert batch.lam[i].item() == pytest.approx(1 - (y2 - y1) * (x2 - x1) / (height * width), abs=1e-6)
    if mode == "batch":
        assert (batch.boxes == batch.boxes[0]).all()


def test_large_images_take_the_other_kernel_and_agree():
    images = torch.rand(5, 3, 80, 70)
    batch = CutMix(mode="sample", generator=generator(1))(images, torch.arange(5))
    expected = images.clone()
    for i, (y1, x1, y2, x2) in enumerate(batch.boxes.tolist()):
        expected[i, :, y1:y2, x1:x2] = images[batch.perm[i], :, y1:y2, x1:x2]
    assert torch.equal(batch.images, expected) and len({tuple(box) for box in batch.boxes.tolist()}) == 5


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("side", [16, 80])
def test_channels_last_is_kept(mode, side):
    images = torch.rand(6, 3, side, side).contiguous(memory_format=torch.channels_last)
    plain = CutMix(mode=mode, generator=generator())(images.contiguous(), torch.arange(6))
    batch = CutMix(mode=mode, generator=generator())(images, torch.arange(6))
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and torch.equal(batch.images, plain.images)


def test_boxes_do_not_depend_on_how_samples_are_batched():
    whole, _ = sample_boxes(12, 32, 32, generator=generator(3))
    parts = generator(3)
    assert torch.equal(whole, torch.cat([sample_boxes(n, 32, 32, generator=parts)[0] for n in (5, 1, 6)]))


def test_every_rank_s_share_is_a_part_of_the_same_batch():
    images = torch.rand(8, 3, 16, 16)
    whole = CutMix(mode="sample", generator=generator(2))(images, torch.arange(8))
    for rank in (0, 1):
        part = CutMix(mode="sample", generator=generator(2))(images, torch.arange(8)).shard(rank, 2)
        assert torch.equal(part.images, whole.images[rank::2]) and torch.equal(part.lam, whole.lam[rank::2])


@pytest.mark.parametrize("mode, share", [("batch", (0.1, 0.5)), ("sample", (0.2, 0.4))])
def test_probability_is_applied_once(mode, share):
    mix = CutMix(prob=0.3, mode=mode, rounding="exact", generator=generator(4))
    images, labels = torch.rand(50, 3, 64, 64), torch.arange(50)
    mixed = [(mix(images, labels).lam < 1).float().mean().item() for _ in range(60)]
    assert share[0] < sum(mixed) / 60 < share[1]
    assert (set(mixed) <= {0.0, 1.0}) == (mode == "batch")
    never = CutMix(prob=0.0, generator=generator())(images, labels)
    assert torch.equal(never.images, images) and (never.lam == 1).all() and never.images is not images


def test_label_follows_the_image_where_nothing_is_pasted():
    mix = CutMix(generator=generator())
    mix.draw = lambda n: torch.tensor([[0.0, 1.0, 0.5, 0.5]], dtype=torch.float64)  # lam = 1: an empty box
    batch = mix(torch.rand(3, 3, 8, 8), torch.tensor([4, 5, 6]))
    assert batch.soft_targets(10).argmax(1).tolist() == [4, 5, 6] and (batch.lam == 1).all()


def test_uncorrected_lam_is_the_drawn_one():
    mix = CutMix(mode="sample", correct_lam=False, generator=generator(5))
    drawn = sample_lam(CutMix(generator=generator(5)).draw(40)[:, 1], 1.0)
    batch = mix(torch.rand(40, 3, 32, 32), torch.arange(40))
    torch.testing.assert_close(batch.lam, drawn.float())
    assert ((batch.lam - box_lam(batch.boxes, 32, 32)).abs() > 0.01).any()


def test_beta_draws_have_the_moments_of_beta():
    uniform = torch.rand(50_000, dtype=torch.float64, generator=generator(6))
    for alpha in (0.1, 0.5, 2.0):
        lam = sample_lam(uniform, alpha)
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(lam.mean() - 0.5) < 0.01 and abs(lam.var() - variance) < 0.02 * variance + 0.002


def test_variants_of_table_8():
    images, labels = torch.rand(200, 3, 32, 32), torch.arange(200)

    def mixed(variant, **options):
        return CutMix(mode="sample", variant=variant, generator=generator(7), **options)(images, labels)

    fixed = mixed("fixed")
    sides = fixed.boxes[:, 2:] - fixed.boxes[:, :2]
    assert sides.max() == 16 and (sides >= 8).all()
    inner = (sides == 16).all(1)
    assert (fixed.lam[inner] == 0.75).all() and inner.any() and (fixed.lam >= 0.75).all()
    assert set(mixed("one_hot").lam.tolist()) == {0.0, 1.0}
    assert set(mixed("complete").lam.tolist()) == {0.5}
    standard = mixed("standard")
    assert torch.equal((standard.lam >= 0.5).float(), mixed("one_hot").lam)

    def spread(batch):
        inside = batch.boxes[(batch.boxes > 0).all(1) & (batch.boxes[:, 2:] < 32).all(1)].float()
        return ((inside[:, :2] + inside[:, 2:]) / 2).std()

    assert spread(mixed("center_gaussian")) < spread(standard)
    scheduled = CutMix(mode="sample", variant="scheduled", rounding="exact", generator=generator(8))
    for progress in (0.0, 0.5, 1.0):
        scheduled.progress = progress
        share = (scheduled(images, labels).boxes.sum(1) > 0).float().mean().item()
        assert abs(share - progress) < 0.12


def test_soft_labels_are_mixed_like_hard_ones():
    labels = torch.tensor([2, 0, 1, 3])
    soft = nn.functional.one_hot(labels, 4).float()
    images, logits = torch.rand(4, 3, 16, 16), torch.randn(4, 4)
    hard, mixed = (CutMix(generator=generator(9))(images, each) for each in (labels, soft))
    torch.testing.assert_close(hard.soft_targets(4), mixed.soft_targets(4))
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            mixed_cross_entropy(logits, hard, smoothing), mixed_cross_entropy(logits, mixed, smoothing)
        )


def test_loss_is_float32_or_better():
    batch = unmixed(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert mixed_cross_entropy(torch.randn(4, 5).bfloat16(), batch).dtype == torch.float32
    assert mixed_cross_entropy(torch.randn(4, 5).double(), batch).dtype == torch.float64


def test_a_single_image_is_its_own_partner_with_a_warning():
    image = torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="mixed with itself"):
        batch = CutMix(generator=generator())(image, torch.tensor([3]))
    assert torch.equal(batch.images, image) and batch.target_b.item() == 3


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_mixup(mode):
    images = numbered(6, 4, 5)
    batch = Mixup(mode=mode, generator=generator(1))(images, torch.arange(6))
    expected = batch.lam * torch.arange(6) + (1 - batch.lam) * batch.perm
    torch.testing.assert_close(batch.images[:, 0, 0, 0], expected)
    assert torch.equal(images, numbered(6, 4, 5)) and (len(set(batch.lam.tolist())) == 1) == (mode == "batch")
    with pytest.raises(ValueError, match="images must be floating point"):
        Mixup()(images.byte(), torch.arange(6))


def test_the_switch_uses_both():
    mix = MixupCutMix(Mixup(generator=generator()), CutMix(rounding="exact", generator=generator(2)))
    kinds = {bool(mix(torch.rand(4, 3, 32, 32), torch.arange(4)).boxes.any()) for _ in range(30)}
    assert kinds == {True, False}
    with pytest.raises(ValueError, match="switch_prob must lie in"):
        MixupCutMix(Mixup(), CutMix(), 1.5)


@pytest.mark.parametrize("op", [Mixup, CutMix])
def test_mixing_inside_the_network(op):
    network = SmallNet(5).eval()
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    plain = network(images)
    mix = ManifoldMix(network, network.points, op(generator=generator(3)))
    seen = set()
    for _ in range(40):
        logits, batch = mix(images, labels)
        seen.add(batch.images.shape[1:])
        assert logits.shape == (8, 5) and len(batch.lam) == 8
    assert len(seen) == 4  # the image and four feature maps, of which two have one shape
    assert torch.equal(network(images), plain)  # outside of it the network is as it was
    at_last = ManifoldMix(network, network.points, op(generator=generator(4)), only=4)
    logits, batch = at_last(images, labels)
    features = batch.images
    torch.testing.assert_close(network.fc(network.layer4(features).mean((2, 3))), logits)
    with pytest.raises(ValueError, match="no submodule 'layer9'"):
        ManifoldMix(network, ("layer9",), op())
    with pytest.raises(ValueError, match="only must lie in 0 .. 4, got 5"):
        ManifoldMix(network, network.points, op(), only=5)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 20), height=st.integers(2, 24), width=st.integers(2, 24), seed=st.integers(0, 99))
def test_cutout_covers_a_clipped_square(size, height, width, seed):
    images = torch.rand(6, 3, height, width) + 1
    covered = Cutout(size, generator=generator(seed))(images)
    hole = (covered == 0).all(1)
    assert hole.flatten(1).any(1).all() and torch.equal(covered[~(covered == 0)], images[~(covered == 0)])
    for each in hole:
        rows, columns = each.any(1).sum().item(), each.any(0).sum().item()
        assert each.sum() == rows * columns and rows <= size and columns <= size
    coloured = Cutout(size, (0.1, 0.2, 0.3), generator(seed))(images)
    assert torch.equal(coloured[:, 1][hole], torch.full((int(hole.sum()),), 0.2))


def test_dropblock_drops_squares_and_keeps_the_sum():
    torch.manual_seed(0)
    layer, features = DropBlock2d(0.9, 4), torch.ones(64, 8, 16, 16)
    dropped = layer(features)
    assert abs((dropped == 0).float().mean() - 0.1) < 0.02
    assert dropped.mean().item() == pytest.approx(1, abs=1e-4)
    zeros = nn.functional.max_pool2d((dropped != 0).float(), 4, 1)  # every dropped unit lies in a full 4 x 4 square
    squares = nn.functional.max_pool2d(1 - zeros, 4, 1, padding=0)
    assert squares.shape[-1] == 10 and zeros.min() == 0
    assert torch.equal(layer.eval()(features), features)
    assert DropBlock2d(0.9, 9)(torch.ones(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="keep_prob must lie in"):
        DropBlock2d(0.0)


def collated(mix, epochs=2):
    """The mixing ratios that two workers draw in each epoch."""
    data = TensorDataset(torch.rand(32, 1, 61, 67), torch.arange(32))
    loader = DataLoader(
        data, 8, num_workers=2, collate_fn=lambda batch: mix(*default_collate(batch)),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return [[batch.lam[0].item() for batch in loader] for _ in range(epochs)]


@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_workers_and_epochs_draw_for_themselves_and_repeat(kind):
    ratios = collated(kind(generator=generator(0)))
    assert len({ratio for epoch in ratios for ratio in epoch}) == 8
    assert ratios == collated(kind(generator=generator(0))) != collated(kind(generator=generator(1)))


@pytest.mark.parametrize("build", [StochasticDepth, ShakeDrop])
def test_dropped_branches_have_the_mean_of_evaluation(build):
    torch.manual_seed(1)
    layer, branch = build(0.6), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    drawn = torch.stack([layer(branch) for _ in range(4000)])
    assert layer.eval()(branch).item() == pytest.approx(0.6) and abs(drawn.mean() - 0.6) < 4 * drawn.std() / 4000**0.5


def test_shakedrop_goes_backward_with_another_scale():
    torch.manual_seed(2)
    layer, scales = ShakeDrop(0.5), []
    for _ in range(200):
        branch = torch.ones(1, 1, 1, 1, requires_grad=True)
        out = layer(branch)
        out.backward()
        scales.append((out.item(), branch.grad.item()))
    forward, backward = map(torch.tensor, zip(*scales, strict=True))
    kept = forward == 1
    assert 60 < kept.sum() < 140 and (backward[kept] == 1).all()
    assert (forward[~kept] < 0).any() and forward.min() >= -1 and backward.min() >= 0 and backward.max() <= 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: CutMix(alpha=0), "alpha must be above 0, got 0"),
        (lambda: CutMix(prob=1.5), r"prob must lie in \[0, 1\], got 1.5"),
        (lambda: CutMix(mode="pair"), "mode must be one of batch, sample, got 'pair'"),
        (lambda: CutMix(variant="x"), "variant must be one of standard"),
        (lambda: CutMix(fixed_size=0), "fixed_size must be at least 1"),
        (lambda: Mixup(partner="x"), "partner must be one of"),
        (lambda: cutmix_box(4, 4, torch.ones(1), torch.zeros(1, 2), "floor"), "rounding must be one of"),
        (lambda: CutMix()(torch.rand(3, 8, 8), torch.arange(3)), r"images must be 4-D .* got shape \(3, 8, 8\)"),
        (lambda: CutMix()(torch.rand(0, 3, 8, 8), torch.arange(0)), "images are empty"),
        (lambda: CutMix()(torch.rand(4, 3, 8, 8), torch.arange(3)), r"labels must be \(4,\) or \(4, K\)"),
        (lambda: Cutout(0), "size must be at least 1"),
        (lambda: Cutout(4)(torch.rand(3, 8, 8)), "images must be 4-D"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_warns_for_two_images():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CutMix(generator=generator())(torch.rand(2, 3, 8, 8), torch.arange(2))
