"""Biased sets, image folders, texture clusters and videos, on small files of the real formats."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rebias import BiasedDigits, SimpleConvNet, assign_bias, biased_mnist, biased_sklearn_digits, colourise
from rebias.data import action
from rebias.data.action import CLASSES as ACTIONS
from rebias.data.action import TEST_VIEWS, VideoFiles, kinetics10, mimetics10, read_clip
from rebias.data.dataset import Reading
from rebias.data.imagenet9 import (
    CLASS_OF_WNID,
    corrupted_sets,
    image_folder,
    join_clusters,
    read_clusters,
    train_set,
)
from rebias.data.texture import gram_vectors, texture_clusters, texture_network
from rebias.data.toy import ToyPoints
from shared_utils.images import BrokenFile


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.floats(0, 1), st.integers(1, 9), st.integers(0, 999))
def test_colours_follow_the_rule(n, rho, n_confusing, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    bias = assign_bias(labels, rho, n_confusing, generator)
    for label in labels.unique().tolist():
        own = bias[labels == label]
        rest = len(own) - int(len(own) * rho)
        assert int((own != label).sum()) == rest
        counts = torch.bincount((own[own != label] - label) % 10, minlength=10)
        assert not counts[n_confusing + 1 :].any() and counts.max() <= max(1, -(-rest // n_confusing))


def test_the_same_seed_draws_the_same_colours_and_another_one_others():
    labels = torch.arange(1000) % 10
    a, b, c = (assign_bias(labels, 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_ground_is_coloured_not_the_digit():
    grey = torch.tensor([[[0, 1], [255, 0]]], dtype=torch.uint8)
    rgb = colourise(grey, torch.tensor([3]))
    assert torch.equal(colourise(grey, torch.tensor([3], dtype=torch.uint8)), rgb)  # not taken for a mask
    assert rgb[0, 0, 0].tolist() == [225, 225, 0] and rgb[0, 0, 1].tolist() == [255, 255, 255]
    data = BiasedDigits(grey, torch.tensor([3]), torch.tensor([3]), "x")
    (images, targets), *_ = data.batches([torch.tensor([0])])
    torch.testing.assert_close(images[0].permute(1, 2, 0), (rgb[0] / 255 - 0.5) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last) and targets.tolist() == [3]


def test_a_dataloader_takes_every_set_item_by_item():
    data = biased_sklearn_digits(True, 0.9)
    (images, labels, bias), *_ = torch.utils.data.DataLoader(data, batch_size=8)
    (expected, targets), *_ = data.batches([torch.arange(8)])
    assert torch.equal(images, expected) and torch.equal(labels, targets) and torch.equal(bias, data.bias[:8])
    points = ToyPoints(10, False, 0)
    (points_, labels, bias), *_ = torch.utils.data.DataLoader(points, batch_size=10)
    assert torch.equal(points_, points.points) and torch.equal(bias, points.bias)


def test_a_network_of_one_pixel_kernels_sees_colours_and_not_shapes():
    """Shuffled pixels change nothing for g: without its colour an image is as good as any other."""
    data = biased_sklearn_digits(False, 1.0)
    (images, _), *_ = data.batches([torch.arange(8)])
    shuffled = images.flatten(2)[:, :, torch.randperm(64)].view_as(images)
    for kernel, same in ((1, True), (3, False)):
        network = SimpleConvNet(kernel_size=kernel, widths=(8, 8)).eval()
        assert torch.allclose(network(images)[0], network(shuffled)[0], atol=1e-5) == same


def test_every_digit_in_all_colours():
    data = biased_sklearn_digits(False, 1.0)
    everything = data.in_all_colours()
    assert len(data) == 597 and len(everything) == 5970
    assert torch.equal(everything.labels, data.labels.repeat_interleave(10))
    assert torch.equal(torch.bincount(everything.bias), torch.full((10,), 597))
    assert torch.equal(everything.mask[13], data.mask[1])


def test_digits_are_split_once_and_rolled_by_seed():
    a, b = (biased_sklearn_digits(True, 0.9, seed=seed) for seed in (1, 2))
    assert len(a) == 4800 and torch.equal(a.labels, b.labels) and not torch.equal(a.mask, b.mask)
    assert int((a.labels != a.bias).sum()) == 482 or abs(int((a.labels != a.bias).sum()) - 482) <= 5
    assert a.record() == biased_sklearn_digits(True, 0.9, seed=1).record() != b.record()


def test_mnist_of_both_sizes(tmp_path, write_mnist):
    write_mnist(tmp_path)
    full, small = (biased_mnist(tmp_path, True, 1.0, side=side, n_images=30) for side in (28, 14))
    assert full.mask.shape == (30, 28, 28) and small.mask.shape == (30, 14, 14)
    assert torch.equal(full.labels, full.bias)
    assert (biased_mnist(tmp_path, False, 0.0).labels != biased_mnist(tmp_path, False, 0.0).bias).all()
    with pytest.raises(ValueError, match="28 or 14, got 7"):
        biased_mnist(tmp_path, True, 1.0, side=7)


def test_mnist_missing_and_damaged(tmp_path, write_mnist):
    with pytest.raises(FileNotFoundError, match="MNIST lacks train-images.*download=True"):
        biased_mnist(tmp_path, True, 0.9)
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="MNIST is damaged"):
        biased_mnist(tmp_path, True, 0.9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.arange(10), 1.01), r"rho must lie in \[0, 1\], got 1.01"),
        ((torch.arange(10), -0.1), r"rho must lie in \[0, 1\]"),
        ((torch.arange(10), float("nan")), r"rho must lie in \[0, 1\], got nan"),
        ((torch.arange(10), 0.5, 10), "n_confusing must be 1 .. 9, got 10"),
        ((torch.arange(11), 0.5), "lie in 0 .. 9, got 0 .. 10"),
        ((torch.rand(10), 0.5), "integers, got"),
    ],
)
def test_assign_bias_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_bias(*arguments)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"grey is \(n, H, W\)"):
        colourise(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels and bias are \(n,\)"):
        BiasedDigits(torch.zeros(3, 2, 2), torch.zeros(3).long(), torch.zeros(2).long(), "x")


def test_the_toy_is_biased_in_training_only():
    train, test = ToyPoints(500, True, 0), ToyPoints(9000, False, 1)
    assert torch.equal(train.labels, train.bias)
    assert (test.labels == test.bias).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert torch.equal((test.points + 1.5).floor().long(), torch.stack([test.bias, test.labels], 1))


# ---- images ----------------------------------------------------------------------------------------------


def test_image_folder_reads_the_nine_classes_only(tmp_path, write_images):
    wnids = ["n02085620", "n01641577", "n99999999"]
    write_images(tmp_path, wnids)
    data = image_folder(tmp_path, "x", reading=Reading(0))
    assert data.names == [f"{w}/ILSVRC_{i}.JPEG" for w in ("n01641577", "n02085620") for i in (0, 1)]
    assert data.labels.tolist() == [2, 2, 0, 0]
    (images, targets), *_ = data.batches([torch.tensor([3, 0])])
    assert images.shape == (2, 3, 224, 224) and targets.tolist() == [0, 2]
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for image in (images[0], data[3][0]):
        torch.testing.assert_close(image, (data.read(0, 3) / 255 - mean) / std)


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path, write_images):
    write_images(tmp_path / "imagenet" / "train", ["n02085620"], per_class=3)

    def first(epoch, order, workers, seed=5):
        data = train_set(tmp_path, False, seed=seed, reading=Reading(workers))
        return next(iter(data.batches([torch.tensor(order)], epoch)))[0]

    a = first(1, [0, 1, 2], 0)
    assert torch.equal(a, first(1, [2, 1, 0], 2).flip(0))
    assert not torch.equal(a, first(2, [0, 1, 2], 0)) and not torch.equal(a, first(1, [0, 1, 2], 0, seed=6))


def test_the_stylised_copy_doubles_the_training_set(tmp_path, write_images):
    for name in ("imagenet", "stylised-imagenet"):
        write_images(tmp_path / name / "train", ["n02085620"])
    assert len(train_set(tmp_path, True)) == 2 * len(train_set(tmp_path, False)) == 4


def test_corrupted_sets(tmp_path, write_images):
    assert corrupted_sets(tmp_path) == {}
    for severity in (1, 5):
        write_images(tmp_path / "imagenet-c" / "fog" / str(severity), ["n02085620"])
    assert {name: len(data) for name, data in corrupted_sets(tmp_path).items()} == {"fog 1": 2, "fog 5": 2}


def test_broken_and_missing_images_are_named(tmp_path, write_images):
    with pytest.raises(FileNotFoundError, match="one folder per WordNet id"):
        image_folder(tmp_path / "none", "x")
    with pytest.raises(FileNotFoundError, match="none of the 42 WordNet ids"):
        image_folder(tmp_path, "x")
    write_images(tmp_path, ["n02085620"])
    (tmp_path / "n02085620" / "ILSVRC_0.JPEG").write_bytes(b"no image")
    with pytest.raises(BrokenFile, match="ILSVRC_0.JPEG: this is not an image"):
        image_folder(tmp_path, "x").read(0, 0)


def test_clusters_are_joined_by_path_in_any_order():
    table = read_clusters()
    names = table.path.tolist()
    assert len(names) == 2100 and table.category.value_counts()[["crab", "frog", "dog"]].tolist() == [200, 150, 250]
    order = torch.randperm(2100, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = join_clusters([names[i] for i in order], table)
    assert torch.equal(shuffled, join_clusters(names, table)[:, order])
    for clusters, cells in zip(join_clusters(names, table), (53, 59, 54), strict=True):
        labels = torch.tensor([CLASS_OF_WNID[name.split("/")[0]] for name in names])
        assert int((torch.bincount(labels * 9 + clusters, minlength=81) >= 10).sum()) == cells


def test_wrong_cluster_labels_are_refused(tmp_path, monkeypatch):
    table = read_clusters()
    with pytest.raises(ValueError, match="2 images but 2100 cluster labels: 1 images have none, first new.JPEG, 2099"):
        join_clusters([table.path[0], "new.JPEG"], table)
    table.head(3).drop(columns="cluster1").to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match="needs the columns"):
        read_clusters(tmp_path / "a.csv")
    pd.concat([table.head(2), table.head(1)]).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="is listed twice"):
        read_clusters(tmp_path / "b.csv")
    monkeypatch.setattr("rebias.data.imagenet9.CLUSTERS_SHA256", "0")
    with pytest.raises(ValueError, match="were changed"):
        read_clusters()


def test_gram_vectors():
    maps = torch.randn(2, 3, 4, 5)
    vectors = gram_vectors(maps)
    expected = torch.einsum("chw,dhw->cd", maps[1], maps[1]).flatten() / 60
    torch.testing.assert_close(vectors[1], expected / expected.norm())


def test_texture_clusters_find_textures(tmp_path):
    rng = np.random.default_rng(0)
    for wnid, noisy in (("n02085620", True), ("n01641577", False)):
        (tmp_path / wnid).mkdir()
        for number in range(6):
            texture = rng.integers(0, 256, (40, 40, 3)) if noisy else np.full((40, 40, 3), 40 * number)
            Image.fromarray(texture.astype(np.uint8)).save(tmp_path / wnid / f"{number}.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    data = image_folder(tmp_path, "x", reading=Reading(0))
    table = texture_clusters(data, network, repeats=2)
    assert list(table.columns) == ["path", "category", "cluster1", "cluster2"]
    noise = set(table.cluster1[table.category == "dog"])
    assert not noise & set(table.cluster1[table.category == "frog"])
    assert table.equals(texture_clusters(data, network, repeats=2))


def test_texture_network_refuses(tmp_path):
    with pytest.raises(ValueError, match="relu1_2, conv3_3, got 'conv9'"):
        texture_network(tmp_path / "x.pth", "conv9")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="is not a state dict of torchvision's vgg16"):
        texture_network(tmp_path / "x.pth", "relu1_2")


# ---- videos ----------------------------------------------------------------------------------------------


@pytest.fixture
def kinetics(tmp_path, write_video):
    lines = ["label,youtube_id,time_start,time_end,split"]
    for number, label in enumerate(("writing", "driving car", "abseiling")):
        lines.append(f"{label.replace(' ', '_') if number == 1 else label},id{number},5,15,train")
    (tmp_path / "kinetics").mkdir()
    (tmp_path / "kinetics" / "train.csv").write_text("\n".join(lines))
    write_video(tmp_path / "kinetics" / "train" / "writing" / "id0_000005_000015.mp4")
    return tmp_path


def test_a_clip_of_eight_frames_at_rate_eight(tmp_path, write_video):
    write_video(tmp_path / "v.mp4")
    first, last = (read_clip(tmp_path / "v.mp4", position) for position in (0.0, 1.0))
    assert first.shape == (8, 3, 48, 64)
    grey = first.float().mean((1, 2, 3)) / 2
    torch.testing.assert_close(grey, torch.linspace(0, 63, 8).round(), atol=2.5, rtol=0)
    torch.testing.assert_close(last.float().mean((1, 2, 3)) / 2, grey + 36, atol=3, rtol=0)
    write_video(tmp_path / "short.mp4", frames=5)
    assert read_clip(tmp_path / "short.mp4", 0.5).shape == (8, 3, 48, 64)


@pytest.mark.parametrize("fps, apart", [(30, 8), (60, 16), (15, 4)])
def test_frames_are_eight_apart_at_thirty_a_second_whatever_the_rate(tmp_path, write_video, fps, apart):
    """The released decoder samples 8 frames of a stretch of 64 / 30 seconds."""
    write_video(tmp_path / "v.mp4", frames=128, fps=fps)
    frames = read_clip(tmp_path / "v.mp4", 0.0).float().mean((1, 2, 3)) / 2
    last = 8 * apart - 1
    torch.testing.assert_close(frames, torch.linspace(0, last, 8).round(), atol=2.5, rtol=0)


def test_the_views_of_a_video_start_as_in_the_released_decoder(monkeypatch):
    """View i of 10 starts at i tenths of what the clip leaves of the video; frame numbers are rounded down."""
    numbered = np.arange(300, dtype=np.uint16)[:, None, None, None] // 2 + np.zeros((1, 1, 3), np.uint16)
    monkeypatch.setattr(action, "decode", lambda path: (list(numbered.astype(np.uint8)), 30.0))
    test = VideoFiles(["v.mp4"], torch.tensor([0]), "x", train=False, reading=Reading(0))
    shown = test.read(0, 9)[0, :, 0, 0].tolist()
    assert shown == [frame // 2 for frame in (212, 221, 230, 239, 248, 257, 266, 275)]
    assert test.read(0, 0)[0, :, 0, 0].tolist() == [frame // 2 for frame in range(0, 64, 9)]


def test_clips_for_training_and_views_for_testing(kinetics):
    path = kinetics / "kinetics" / "train" / "writing" / "id0_000005_000015.mp4"
    train, test = (VideoFiles([path], torch.tensor([9]), "x", train=t, reading=Reading(0)) for t in (True, False))
    (clips, targets), *_ = train.batches([torch.tensor([0])])
    assert clips.shape == (1, 3, 8, 224, 224) and targets.tolist() == [9]
    view = test.read(0, 3)
    assert len(test) == TEST_VIEWS and view.shape == (3, 8, 256, 256)
    (views, _), *_ = test.batches([torch.tensor([3])])
    for clip in (views[0], test[3][0]):
        torch.testing.assert_close(clip, (view / 255 - 0.45) / 0.225)
    logits = torch.randn(TEST_VIEWS, 10)
    summed, labels = test.sum_views(logits)
    torch.testing.assert_close(summed[0], logits.softmax(1).sum(0))
    assert labels.tolist() == [9]


def test_missing_videos_are_counted_and_named(kinetics, caplog):
    with pytest.raises(FileNotFoundError, match="1 of 2 videos are missing .*id1_000005_000015.mp4"):
        kinetics10(kinetics, True)
    import logging

    logging.getLogger("rebias").addHandler(caplog.handler)
    data = kinetics10(kinetics, True, reading=Reading(skip_missing=True))
    assert len(data) == 1 and data.labels.tolist() == [ACTIONS.index("writing")]
    assert "1 of 2 videos are missing" in caplog.text
    with pytest.raises(FileNotFoundError, match="annotation file not found"):
        mimetics10(kinetics)


def test_a_broken_video_and_a_strange_annotation(kinetics):
    path = kinetics / "bad.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(BrokenFile, match="bad.mp4: .*replace the video"):
        read_clip(path, 0.0)
    (kinetics / "kinetics" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="needs the columns label"):
        kinetics10(kinetics, True)
    (kinetics / "kinetics" / "train.csv").write_text("label,youtube_id,time_start,time_end\nabseiling,x,1,2\n")
    with pytest.raises(ValueError, match="names no video of the ten classes"):
        kinetics10(kinetics, True)
