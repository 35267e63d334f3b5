"""Models of others, and plain modules on one's own images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cutmix_robustness import (
    benchmark_of,
    cli,
    evaluate,
    load_model,
    mahalanobis_scores,
    odin_scores,
    ood_scores,
    pyramidnet,
    resnet_cifar,
    temperature,
)
from cutmix_robustness.foreign import released
from cutmix_robustness.settings import SUITES

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def colour_model():
    """Knows a red image from a green from a blue one; made for images in [0, 1]."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    model[2].weight.data = 20 * torch.eye(3)
    return model


def coloured(n=30, side=32):
    labels = torch.arange(n) % 3
    images = torch.randint(0, 90, (n, 3, side, side), dtype=torch.uint8)
    images[torch.arange(n), labels] += 120
    return images, labels


def test_a_plain_module_is_judged_on_one_s_own_images():
    images, labels = coloured()
    grey = torch.full((20, 3, 32, 32), 99, dtype=torch.uint8)
    suites = [suite for suite in SUITES if suite not in ("localization", "autoattack", "mahalanobis")]
    model = colour_model().train()
    frame = evaluate({"colour": model}, suites, benchmark_of(images, labels, {"grey": grey}), severities=(1,))
    row = frame.loc["colour"]
    assert row["top1_error"] == 0 and row["grey_auroc"] == 100 and row["ood_auroc_energy"] > 90
    assert row["temperature"] < 1 and row["ece_after_scaling"] < row["ece_before_scaling"] and not model.training
    assert row["fgsm_error"] == 0 and row["center_occlusion_area"] > 0 and np.isfinite(frame.to_numpy(float)).all()
    with pytest.raises(ValueError, match="the suite mahalanobis needs training images"):
        evaluate({"colour": model}, ["mahalanobis"], benchmark_of(images, labels, {"grey": grey}))


def test_temperature_and_scores():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(logits, 1), 1)[:, 0]
    assert temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    found = ood_scores(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    np.testing.assert_allclose(found["energy"], [np.log(2), np.log(np.exp(3) + 1)])
    assert found["max_logit"].tolist() == [0, 3] and found["msp"][0] == 0.5


def test_odin_takes_one_step_towards_the_predicted_class():
    torch.manual_seed(1)
    images, weight = torch.rand(6, 3, 4, 4), torch.randn(5, 48)
    logits = images.flatten(1) @ weight.T
    excess = torch.softmax(logits / 1000, 1) - nn.functional.one_hot(logits.argmax(1), 5)
    moved = images.flatten(1) - 0.0014 * torch.sign(excess @ weight)
    expected = torch.softmax((moved @ weight.T).double() / 1000, 1).amax(1)
    torch.testing.assert_close(odin_scores(lambda x: x.flatten(1) @ weight.T, images), expected, rtol=0, atol=1e-9)


def test_mahalanobis_distance_by_hand():
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 8], [30, 50])
    train = rng.normal(size=(80, 3)) @ np.diag([1, 2, 0.1]) + 5 * (labels == 8)[:, None]
    means = [train[labels == label].mean(0) for label in (3, 8)]
    spread = sum(
        (train[labels == label] - mean).T @ (train[labels == label] - mean)
        for label, mean in zip((3, 8), means, strict=True)
    )
    features = rng.normal(size=(4, 3))
    distances = [[d @ np.linalg.inv(spread / 80) @ d for d in features - mean] for mean in means]
    np.testing.assert_allclose(mahalanobis_scores(train, labels, features), -np.min(distances, 0))


def normalised(model, images):
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return model.eval()((images - mean) / std)


def test_models_from_code_and_torchscript(tmp_path, monkeypatch):
    images = torch.rand(2, 3, 32, 32)
    (tmp_path / "theirs.py").write_text("import torch\ndef build():\n    return torch.nn.Flatten()\nnothing = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(load_model("theirs:build", 3, MEAN, STD)(images), images.flatten(1))  # nothing put before it
    with pytest.raises(ValueError, match="weights: expected none for theirs:build"):
        load_model("theirs:build", 3, MEAN, STD, tmp_path / "own.pt")
    torch.jit.script(colour_model()).save(str(tmp_path / "m.torchscript"))
    found = load_model(str(tmp_path / "m.torchscript"), 3, MEAN, STD)(images)
    torch.testing.assert_close(found, normalised(colour_model(), images))
    with pytest.raises(ValueError, match="theirs:absent cannot be imported"):
        load_model("theirs:absent", 3, MEAN, STD)
    with pytest.raises(FileNotFoundError, match="none.pt: file not found; a model is torchvision:<name>"):
        load_model("none.pt", 3, MEAN, STD)
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bad.pt: is neither weights nor TorchScript"):
        load_model(str(tmp_path / "bad.pt"), 3, MEAN, STD)


@pytest.mark.parametrize(
    "build",
    [lambda: pyramidnet(20, 24, 10), lambda: resnet_cifar(20, 10), lambda: pyramidnet(14, 12, 5, bottleneck=False)],
)
def test_the_layout_of_the_released_checkpoints(build, tmp_path):
    torch.manual_seed(1)
    network = build()
    content = {"epoch": 299, "arch": "x", "state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}
    torch.save(content | {"best_err1": torch.tensor(14.4)}, tmp_path / "model_best.pth.tar")
    images = torch.rand(2, 3, 32, 32)
    found = load_model(str(tmp_path / "model_best.pth.tar"), 10, MEAN, STD)(images)
    torch.testing.assert_close(found, normalised(network, images))
    with pytest.raises(ValueError, match="unknown network"):
        released({"weight": torch.zeros(1)}, "x.pt")


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_efficientnet"])
def test_named_networks_with_one_s_own_weights(name, tmp_path):
    if name.startswith("timm"):
        network = pytest.importorskip("timm").create_model("test_efficientnet", num_classes=7)
    else:
        from torchvision.models import squeezenet1_1

        network = squeezenet1_1(num_classes=7)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pt")
    images = torch.rand(2, 3, 64, 64)
    found = load_model(name, 7, MEAN, STD, tmp_path / "w.pt")(images)
    torch.testing.assert_close(found, normalised(network, images))
    with pytest.raises(ValueError, match="w.pt: .* has shape"):
        load_model(name, 9, MEAN, STD, tmp_path / "w.pt")


def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import helper

    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [3, 3], (20 * np.eye(3)).ravel())
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, 32, 32]), ("y", ["n", 3]))
    )
    graph = helper.make_graph(nodes, "colour", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    images, labels = coloured()
    found = load_model(str(tmp_path / "m.onnx"), 3, MEAN, STD)
    torch.testing.assert_close(found(images / 255), normalised(colour_model(), images / 255), rtol=1e-4, atol=1e-4)
    assert evaluate({"m": found}, ("clean", "calibration"), benchmark_of(images, labels))["top1_error"].tolist() == [0]
    with pytest.raises(ValueError, match="an ONNX model has no gradients"):
        evaluate({"m": found}, ("fgsm",), benchmark_of(images, labels))


def test_eval_of_any_model_on_a_folder(tmp_path, monkeypatch, capsys):
    images, labels = coloured(6, 224)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "pictures" / "rgb"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    order = "bgr"  # class folders are sorted by name: b, g, r
    torch.jit.script(nn.Sequential(colour_model(), Reorder([order.index(c) for c in "rgb"]))).save(tmp_path / "m.pt")
    words = [
        "eval",
        str(tmp_path / "m.pt"),
        "--data",
        str(tmp_path / "pictures"),
        "--suites",
        "clean",
        "--workers",
        "0",
    ]
    monkeypatch.setattr("sys.argv", ["cutmix-robustness", *words])
    cli.main()
    assert json.loads(capsys.readouterr().out)["top1_error"] == 0


class Reorder(nn.Module):
    def __init__(self, order: list[int]):
        super().__init__()
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.order]
