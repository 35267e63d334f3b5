"""Feature networks: recipe, preprocessing, reproducible random weights, and what weights files are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models import inception_v3, vgg16
from torchvision.transforms import v2

from prdc_metrics.data import Resize
from prdc_metrics.embeddings import FrozenEmbedding, embedding_provenance, load_embedding, recipe
from prdc_metrics.features import extract_features
from prdc_metrics.inception import empty_inception, resize_as_tensorflow


@pytest.fixture(scope="module")
def r64():
    """R64 with seed 3; half a gigabyte, so built once."""
    return load_embedding("random-vgg16-64", seed=3)


def synthetic_state(network):
    """A state dict of the right shapes in a small file: kernels are flat, rows of linear layers as well."""
    rng = np.random.default_rng(0)

    def fake(key, value):
        if "running_var" in key or value.ndim == 0:
            return torch.ones(value.shape, dtype=value.dtype)
        kept = value.shape[:2] if value.ndim == 4 else value.shape[:1]
        flat = value.shape[len(kept) :]
        numbers = torch.from_numpy(rng.standard_normal(tuple(kept), dtype=np.float32))
        numbers *= (2 / kept[1]) ** 0.5 / flat.numel() if value.ndim == 4 else 2 / flat.numel()
        return numbers.view(*kept, *[1] * len(flat)).expand(value.shape)

    return {key: fake(key, value) for key, value in network.state_dict().items()}


def on_meta(builder):
    with torch.device("meta"):
        return builder(weights=None, init_weights=False)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg.pth"
    torch.save(synthetic_state(on_meta(vgg16)), path)
    return path


def test_same_seed_same_weights_and_global_rng_untouched(r64):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = load_embedding("random-vgg16-64", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(again.parameters(), r64.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_torchvision_init_follows_the_seed_and_leaves_global_rng(r64):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    network = load_embedding("random-vgg16-64", seed=3, init="torchvision")
    assert torch.equal(torch.get_rng_state(), before)
    assert network.trunk[0].weight.std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # fan_out, He
    assert network.trunk[-1].weight.std() == pytest.approx(0.01, rel=0.01)
    assert network.provenance["init"] == "torchvision"


def test_r64_is_orthogonal_where_it_says_so(r64):
    convolutions = [layer for layer in r64.trunk if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13
    for layer in convolutions[1::4]:
        rows = layer.weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
    head = r64.trunk[-1].weight  # (64, 4096)
    torch.testing.assert_close(head @ head.T, torch.eye(64), atol=1e-4, rtol=0)
    assert all(layer.bias.eq(0).all() for layer in r64.trunk if hasattr(layer, "bias"))


def test_r64_features_differ_between_images_and_keep_their_scale(r64):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = images[1].mean()
    features = r64(images)
    assert features.shape == (3, 64)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert features.isfinite().all() and 1e-2 < features.std() < 1e2
    assert torch.cdist(features, features)[0, 1] > 0.1 * features.norm(dim=1).mean()


def test_frozen(r64):
    nn.Sequential(r64).train()
    assert not any(module.training for module in r64.modules())
    assert not any(parameter.requires_grad for parameter in r64.parameters())


@pytest.mark.parametrize("name, side", [("random-vgg16-64", 224), ("inception-pool3", 299)])
def test_preprocessing_equals_a_torchvision_pipeline(name, side):
    prepare = FrozenEmbedding(nn.Identity(), {"name": name}, recipe(name))
    images = torch.rand(2, 3, 300, 77)
    stats = ([0.5] * 3, [0.5] * 3) if side == 299 else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    by_hand = v2.Compose([v2.Resize((side, side), antialias=True), v2.Normalize(*stats)])
    assert torch.equal(prepare(images), by_hand(images))
    resized = nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(prepare(images)[:, 0], (resized[:, 0] - stats[0][0]) / stats[1][0])


@pytest.mark.parametrize("images", [torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.ones(1, 3, 8, 8).int()])
def test_forward_refuses_other_shapes_and_types(images):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) floating"):
        FrozenEmbedding(nn.Identity(), {"name": "random-vgg16-64"}, recipe("random-vgg16-64"))(images)


def test_vgg_layers_are_torchvisions(vgg_file):
    reference = on_meta(vgg16)
    reference.load_state_dict(torch.load(vgg_file), assign=True)
    reference.eval()
    before = load_embedding("vgg16-fc2", weights=vgg_file, side=64)
    after = load_embedding("vgg16-fc2-relu", weights=str(vgg_file), side=64)
    images = torch.rand(2, 3, 64, 64) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    with torch.inference_mode():
        features = before(images)
        normalised = v2.functional.normalize(images, before.recipe.mean, before.recipe.std)
        pooled = reference.avgpool(reference.features(normalised)).flatten(1)
        torch.testing.assert_close(features, reference.classifier[:4](pooled))
        assert features.shape == (2, 4096) and (features < 0).any() and (features[0] - features[1]).abs().max() > 0.01
        torch.testing.assert_close(after(images), features.relu())
    assert len(before.provenance["weights"]) == 64 and before.provenance["seed"] is None


def test_inception_equals_torchvisions_pretrained_recipe(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save(synthetic_state(on_meta(inception_v3)), path)
    with torch.device("meta"):
        reference = inception_v3(weights=None, init_weights=False, transform_input=True)
    reference.load_state_dict(torch.load(path), assign=True)
    reference.fc = nn.Identity()
    images = torch.rand(2, 3, 299, 299) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    imagenet = v2.functional.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        features = load_embedding("inception-pool3", weights=path)(images)
        expected = reference.eval()(imagenet)
    assert features.shape == (2, 2048) and (expected[0] - expected[1]).abs().max() > 0.01 * expected.max()
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4 * expected.max().item())


def fid_pixels():
    """(2, 75, 120, 3) uint8 whose corners, edges and middle differ."""
    ramp = np.add.outer(np.arange(75) * 3, np.arange(120) * 2)
    return np.stack([ramp[..., None] * [1, 2, 3], ramp[::-1, :, None] // 3 * [3, 1, 2]]).astype(np.uint8)


def test_fid_inception_is_torch_fidelitys(tmp_path):
    """Features that torch-fidelity 0.4 has for the same images and weights: its resize, its pools, its scaling."""
    path = tmp_path / "fid.pth"
    torch.save({k: v for k, v in synthetic_state(empty_inception()).items() if "batches" not in k}, path)
    golden = np.array(json.loads((Path(__file__).parent / "golden" / "fid_inception.json").read_text()))
    found = extract_features(fid_pixels(), "fid-inception", weights=path).numpy()
    assert found.shape == (2, 2048) and np.abs(golden[0] - golden[1]).max() > 0.05 * golden.max()
    np.testing.assert_allclose(found[:, ::64], golden, atol=1e-4 * golden.max())


def test_tensorflow_resize_by_hand():
    """Pixel i of H comes from i * h / H, and the last pixels repeat."""
    images = torch.tensor([[[0.0, 3.0], [6.0, 9.0]]])
    expected = [[0, 1.5, 3, 3], [3, 4.5, 6, 6], [6, 7.5, 9, 9], [6, 7.5, 9, 9]]
    assert resize_as_tensorflow(images, (4, 4)).tolist() == [expected]
    assert resize_as_tensorflow(images, (1, 1)).tolist() == [[[0.0]]]
    assert torch.equal(Resize((2, 2), "tensorflow")(images), images)


def test_any_timm_model_from_a_file_of_its_weights(tmp_path):
    """The features before the classifier, on images as timm has them; another size moves a ViT's positions."""
    whole = timm.create_model("test_vit", pretrained=False, num_classes=9).eval()
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    state = torch.get_rng_state()
    ours = load_embedding("timm:test_vit", weights=tmp_path / "vit.pth")
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(2, 3, 160, 160)
    cfg = timm.get_pretrained_cfg("test_vit")
    seen = v2.functional.normalize(images, list(cfg.mean), list(cfg.std))
    with torch.inference_mode():
        expected = whole.forward_head(whole.forward_features(seen), pre_logits=True)
        torch.testing.assert_close(ours(images), expected)
        small = load_embedding("timm:test_vit", weights=tmp_path / "vit.pth", side=96)
        assert small(images).shape == expected.shape
    assert ours.provenance["resize"] == "160x160 bicubic antialias" and len(ours.provenance["weights"]) == 64
    assert small.provenance["resize"] == "96x96 bicubic antialias"
    convolutional = timm.create_model("test_resnet", pretrained=False)
    torch.save({"state_dict": convolutional.state_dict()}, tmp_path / "resnet.pth")
    assert load_embedding("timm:test_resnet", weights=tmp_path / "resnet.pth", side=64)(images).ndim == 2
    for wrong in ("vit.pth", "resnet.pth"):
        other = "timm:test_resnet" if wrong == "vit.pth" else "timm:test_vit"
        with pytest.raises(ValueError, match=f"{wrong}: (these are not weights of timm's|cannot be read as)"):
            load_embedding(other, weights=tmp_path / wrong)
    torch.save({k: v for k, v in whole.state_dict().items() if k != "norm.bias"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part.pth: these are not weights of .*test_vit: 1 missing \(norm.bias\)"):
        load_embedding("timm:test_vit", weights=tmp_path / "part.pth")


def test_dinov2_and_clip_as_timm_names_them():
    """What their papers' images look like: ImageNet's or CLIP's own mean, bicubic."""
    dino = recipe("timm:vit_large_patch14_dinov2.lvd142m", 224)
    assert str(dino.resize) == "224x224 bicubic antialias" and dino.mean == (0.485, 0.456, 0.406)
    clip = recipe("timm:vit_large_patch14_clip_quickgelu_224.openai")
    assert clip.resize.size == (224, 224) and clip.mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    "name, file, prefix",
    [
        ("vgg16-fc2-relu", "vgg16-397923af.pth", "397923af"),
        ("inception-pool3", "inception_v3_google-0cc3c7bd.pth", "0cc3c7bd"),
        ("fid-inception", "pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    ],
)
def test_missing_weights_say_which_file_which_hash_and_how_to_fetch(name, file, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    path = tmp_path / "hub" / "checkpoints" / file
    with pytest.raises(FileNotFoundError) as error:
        load_embedding(name)
    for part in (str(path), f"sha256 {prefix}", f"curl -fL --create-dirs -o '{path}' https://", file):
        assert part in str(error.value)
    assert not path.exists()


def test_file_of_torchvisions_name_must_have_its_hash(vgg_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(vgg_file.read_bytes())
    for weights in (None, cached):
        with pytest.raises(ValueError, match="vgg16-397923af.pth: damaged, sha256 is"):
            load_embedding("vgg16-fc2", weights=weights)


def test_weights_of_another_network_are_refused_in_short(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict() | {"features.0.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError) as error:
        load_embedding("vgg16-fc2", weights=path)
    message = str(error.value)
    assert "other.pth" in message and "not weights of torchvision's vgg16" in message
    assert "31 missing (classifier.0.bias" in message and "2 unexpected (0.bias, 0.weight)" in message
    assert "1 of another shape (features.0.bias)" in message
    assert len(message) < len(str(path)) + 250


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", ["pickle", "torn", "empty", "tensor"])
def test_damaged_or_foreign_weights_name_the_file_and_run_nothing(content, tmp_path, vgg_file):
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    if content == "tensor":
        torch.save(torch.zeros(3), path)
    else:
        torn = vgg_file.read_bytes()[:5000]
        path.write_bytes({"pickle": pickle.dumps(Trap(sprung), protocol=2), "torn": torn, "empty": b""}[content])
    with pytest.raises(ValueError, match=r"weights\.pth: cannot be read as a state dict"):
        load_embedding("vgg16-fc2", weights=path)
    assert not sprung.exists()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'vgg19' is not one of vgg16-fc2-relu, .*, nor timm:MODEL"):
        load_embedding("vgg19")
    with pytest.raises(ValueError, match="fid-inception takes images of 299 x 299, got side=224"):
        load_embedding("fid-inception", side=224)
    with pytest.raises(ValueError, match="'timm:vit_of_mine': timm .* has no such model"):
        load_embedding("timm:vit_of_mine", weights="x.pth")
    with pytest.raises(FileNotFoundError, match="'timm:test_vit' needs its weights"):
        load_embedding("timm:test_vit")
    with pytest.raises(ValueError, match="untrained and takes no weights"):
        load_embedding("random-vgg16-64", weights="x.pth")
    with pytest.raises(ValueError, match="init 'he' is neither"):
        load_embedding("random-vgg16-64", init="he")


def test_side_resizes_vgg_and_is_recorded(r64):
    small = FrozenEmbedding(r64.trunk, embedding_provenance("random-vgg16-64", side=64), recipe("random-vgg16-64", 64))
    assert small.provenance["resize"] == "64x64 bilinear antialias"
    images = torch.rand(2, 3, 64, 64)
    features = small(images)
    assert features.shape == (2, 64) and features.isfinite().all()
    assert torch.equal(features, small.trunk(v2.functional.normalize(images, small.recipe.mean, small.recipe.std)))


def test_provenance_says_what_the_features_depend_on(r64):
    assert r64.provenance == embedding_provenance("random-vgg16-64", seed=3)
    assert r64.provenance == {
        "name": "random-vgg16-64",
        "weights": "random",
        "seed": 3,
        "init": "orthogonal",
        "resize": "224x224 bilinear antialias",
    }
