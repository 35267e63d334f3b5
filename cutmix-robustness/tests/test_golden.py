"""Against the reference implementations and first principles; tolerances as stated in golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cutmix_robustness.attacks import fgsm, input_gradient, pgd_from
from cutmix_robustness.corruption_error import ALEXNET_ERROR, mean_corruption_error
from cutmix_robustness.cutmix import CutMix, MixedBatch, box_lam, cutmix_box, mixed_cross_entropy, sample_boxes
from cutmix_robustness.dropout import ShakeDrop, dropblock_gamma, survival_probability
from cutmix_robustness.localization import box_iou, cam_box
from cutmix_robustness.networks import pyramidnet, resnet_cifar, resnet_imagenet
from cutmix_robustness.occlusion import in_between, occlude
from cutmix_robustness.uncertainty import (
    adaptive_calibration_error,
    calibration,
    calibration_error,
    confidence,
    confidence_bins,
    ood_metrics,
)

GOLDEN = Path(__file__).parent / "golden"


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file}


def values(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_boxes():
    g = arrays("boxes")
    for i in range(len(g["lam"])):
        height, width = int(g["size_dim2"][i]), int(g["size_dim3"][i])
        center = torch.tensor([[g["c_dim2"][i], g["c_dim3"][i]]], dtype=torch.float64)
        box = cutmix_box(height, width, torch.tensor([g["lam"][i]]), center)
        assert box[0].tolist() == g["box"][i].tolist()
        assert abs(box_lam(box, height, width).item() - g["lam_adjusted"][i]) < 1e-12


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_batches_and_loss(case, monkeypatch):
    g = {key[3:]: torch.as_tensor(value) for key, value in arrays("cutmix_batches").items() if key.startswith(case)}
    n, _, height, width = g["input"].shape
    mix = CutMix()
    center = (g["center"].double() + 0.5) / torch.tensor([height, width])
    monkeypatch.setattr(mix, "draw", lambda count: torch.cat([torch.zeros(1), g["lam"][None], center])[None])
    monkeypatch.setattr("cutmix_robustness.cutmix.partners", lambda *arguments: g["perm"])
    before = g["input"].clone()
    batch = mix(g["input"], g["target"])
    assert torch.equal(batch.images, g["output"]) and torch.equal(g["input"], before)
    assert batch.boxes[0].tolist() == g["box"].tolist()
    torch.testing.assert_close(batch.soft_targets(10).double(), g["soft_target"], rtol=0, atol=1e-7)
    exact = MixedBatch(
        batch.images, batch.target_a, batch.target_b, g["lam_adjusted"].expand(n), batch.boxes, g["perm"]
    )
    assert abs(mixed_cross_entropy(g["logits"], exact).item() - g["loss"].item()) < 1e-12


def test_trace_of_the_reference():
    trace = values("rng_trace")
    for row in trace["rows"]:
        if row["step"] == 0:
            numpy_rng = np.random.RandomState(row["seed"])
            torch.manual_seed(row["seed"])
        assert numpy_rng.rand() == row["r"]
        if not row["applied"]:
            continue
        lam = numpy_rng.beta(1.0, 1.0)
        perm = torch.randperm(16)
        center = [numpy_rng.randint(32), numpy_rng.randint(32)]
        box = cutmix_box(32, 32, torch.tensor([lam], dtype=torch.float64), torch.tensor([center]).double())
        assert (lam, perm.tolist(), box[0].tolist()) == (row["lam"], row["perm"], row["box"])
        assert box_lam(box, 32, 32).item() == row["lam_adjusted"]


def test_moments_of_the_pasted_area():
    for row in values("lambda_moments")["rows"]:
        n = 40_000
        boxes, lam = sample_boxes(n, row["H"], row["W"], generator=torch.Generator().manual_seed(0))
        area, empty = 1 - lam, (lam == 1).double().mean().item()
        spread = np.sqrt(row["second_moment"] - row["mean_patch_fraction"] ** 2)
        assert abs(area.mean().item() - row["mean_patch_fraction"]) < 4 * spread / np.sqrt(n)
        p = row["prob_empty_patch"]
        assert abs(empty - p) < 4 * np.sqrt(p * (1 - p) / n) + 1e-12
    boxes, lam = sample_boxes(n, 4096, 4096, rounding="exact", generator=torch.Generator().manual_seed(1))
    assert abs((1 - lam).mean().item() - 77 / 240) < 4 * spread / np.sqrt(n)


def test_where_pixels_are_replaced():
    probability = arrays("pixel_replace_prob_32")["prob"]
    n = 20_000
    boxes, _ = sample_boxes(n, 32, 32, generator=torch.Generator().manual_seed(2))
    y1, x1, y2, x2 = boxes[:, :, None].unbind(1)
    axis = torch.arange(32)
    inside = ((axis >= y1) & (axis < y2)).double()[:, :, None] * ((axis >= x1) & (axis < x2)).double()[:, None]
    error = np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(inside.mean(0).numpy() - probability) < 5 * error).all()


NETWORKS = {
    "pyramidnet200_a240_c100": lambda: pyramidnet(),
    "pyramidnet110_a64_bottleneck_c100": lambda: pyramidnet(110, 64),
    "pyramidnet20_a24_bottleneck_c10": lambda: pyramidnet(20, 24, 10),
    "resnet110_bottleneck_c100": lambda: resnet_cifar(),
    "resnet50_imagenet": lambda: resnet_imagenet(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_architectures(name):
    import hashlib

    golden = values("architectures")[name]
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert sum(p.numel() for p in network.parameters()) == golden["n_params"]
    shapes = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest() == golden["sha256_of_json_name_shape_list"]
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == golden["n_conv"]
    assert network.fc.in_features == golden["fc_in"]


def test_pyramidnet_with_ten_classes():
    with torch.device("meta"):
        assert sum(p.numel() for p in pyramidnet(num_classes=10).parameters()) == 26_752_702


@pytest.mark.parametrize(
    "name, build",
    [("pyramidnet20_a24", lambda: pyramidnet(20, 24, 10)), ("resnet20_bottleneck", lambda: resnet_cifar(20, 10))],
)
def test_networks(name, build):
    g = {key: torch.as_tensor(value) for key, value in arrays(name).items()}
    network = build()
    network.load_state_dict({key[3:]: value for key, value in g.items() if key.startswith("sd/")})
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(network.eval()(g["input"]), g["logits_eval"], **close)
    logits = network.train()(g["input"])
    torch.testing.assert_close(logits, g["logits_train"], **close)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert abs(loss.item() - g["loss_train"].item()) < 1e-4
    loss.backward()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad.double().norm(), g[f"gradnorm/{key}"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["plain_c10", "ties_c10", "saturated_c100"])
def test_uncertainty(case):
    golden, g = values("metrics")[case], arrays("metrics")
    logits, labels, ood = (torch.as_tensor(g[f"{case}/{name}"]) for name in ("logits", "labels", "logits_ood"))
    conf, predicted = confidence(logits)
    correct = predicted == labels.numpy()
    for bins in (10, 15):
        for norm, name in (("l1", "ece"), ("l2", "rmsce"), ("max", "mce")):
            assert abs(calibration_error(conf, correct, bins, norm) - golden[f"{name}_{bins}"]) < 1e-9
        index = confidence_bins(conf, bins)
        assert [[b, (index == b).sum()] for b in np.unique(index)] == [row[:2] for row in golden[f"bins_{bins}"]]
    assert abs(adaptive_calibration_error(conf, correct) - golden["adaptive_ece_15"]) < 1e-9
    ours = calibration(logits, labels)
    assert abs(ours["nll"] - golden["nll"]) < 1e-9 and abs(ours["brier"] - golden["brier_multiclass"]) < 1e-9
    known, unknown = (numpy_scores(part.double().numpy()) for part in (logits, ood))
    for name in ("ood_msp", "ood_energy", "ood_maxlogit"):
        _compare_ood(ood_metrics(known[name], unknown[name]), golden[name], 1e-9)


def numpy_scores(logits):
    """As the fixture's: its many ties differ in the last bit from another library's softmax."""
    top = logits.max(1)
    total = np.exp(logits - top[:, None]).sum(1)
    softmax = np.exp(logits - top[:, None]) / total[:, None]
    return {"ood_msp": softmax.max(1), "ood_energy": top + np.log(total), "ood_maxlogit": top}


def _compare_ood(ours, golden, tolerance):
    assert abs(ours.pop("tnr95") - golden["tnr_at_95tpr"]) < tolerance
    for name, value in ours.items():
        assert abs(value - golden[name]) < tolerance, name


def test_uncertainty_by_hand():
    golden = values("metrics_hand")
    edge = golden.pop("edge_conf")
    conf, correct = np.array(edge["conf"]), np.array(edge["correct"])
    for bins in (5, 10, 15):
        assert abs(calibration_error(conf, correct, bins) - edge[f"ece_{bins}"]) < 1e-12
        assert abs(calibration_error(conf, correct, bins, "max") - edge[f"mce_{bins}"]) < 1e-12
    for case in golden.values():
        _compare_ood(ood_metrics(case["in_scores"], case["out_scores"]), case, 1e-12)


def test_attacks():
    g = {key[2:]: torch.as_tensor(value) for key, value in arrays("attacks").items()}

    def model(x):
        hidden = torch.tanh((x - g["mean"]) / g["std"] @ g["W1"].T + g["b1"])
        return hidden @ g["W2"].T + g["b2"]

    def same(ours, golden):
        steady = g["grad"].abs() >= 1e-12
        torch.testing.assert_close(ours[steady], golden[steady], rtol=0, atol=1e-9)

    x, y, eps = g["x"], g["y"], g["eps"].item()
    torch.testing.assert_close(input_gradient(model, x, y), g["grad"], rtol=0, atol=1e-9)
    same(fgsm(model, x, y, eps), g["x_fgsm"])
    same(fgsm(model, x, y, eps, clip=False), g["x_fgsm_noclip"])
    steps, step = int(g["steps"]), g["step"].item()
    same(pgd_from(model, x, y, x, eps, steps, step), g["x_pgd_zero_start"])
    same(pgd_from(model, x, y, (x + g["start_noise"]).clamp(0, 1), eps, steps, step), g["x_pgd_given_start"])
    assert torch.equal(model(g["x_fgsm"]).argmax(1), g["pred_fgsm"])


def test_occlusion():
    g = {key: torch.as_tensor(value) for key, value in arrays("occlusion").items()}
    for size in g["holes"].tolist():
        assert torch.equal(occlude(g["input"], size), g[f"center_{size}"])
        assert torch.equal(occlude(g["input"], size, "boundary"), g[f"boundary_{size}"])
        between = in_between(g["input"], g["other"], size / 16, "cutmix")
        assert torch.equal(between, g[f"cutmix_between_{size}"])


def test_mean_corruption_error():
    golden = values("mce")
    errors = np.array([golden["errors"][name] for name in ALEXNET_ERROR])
    assert abs(mean_corruption_error(errors, "alexnet")["mean"] - golden["mce"]) < 1e-12
    assert abs(mean_corruption_error(errors)["mean"] - golden["mean_unnormalised"]) < 1e-12
    relative = mean_corruption_error(errors, "alexnet", clean_error=golden["clean_error"])
    assert abs(relative["mean"] - golden["relative_mce"]) < 1e-12
    rise = mean_corruption_error(errors, clean_error=golden["clean_error"])["mean"]
    assert abs(rise - golden["mean_unnormalised"] + golden["clean_error"]) < 1e-12
    noise = np.mean([golden["ce"][name] for name in ("gaussian_noise", "shot_noise", "impulse_noise")])
    assert abs(mean_corruption_error(errors, "alexnet")["noise"] - noise) < 1e-12


def test_boxes_of_activation_maps():
    g = arrays("wsol_boxes")
    for i, cam in enumerate(g["cam"]):
        assert cam_box(cam, g["sigma"][i]) == tuple(g["box_conn8"][i])
        assert cam_box(cam, g["sigma"][i], connectivity=4) == tuple(g["box_conn4"][i])
        assert abs(box_iou(np.array(cam_box(cam, g["sigma"][i])), g["gt_box"][i]) - g["iou_conn8"][i]) < 1e-12


def test_losses_and_rates():
    g = values("losses_and_rates")
    logits, lam = torch.tensor(g["logits"], dtype=torch.float64), torch.tensor(g["lam"], dtype=torch.float64)
    a, b = torch.tensor(g["y_a"]), torch.tensor(g["y_b"])
    nothing = torch.zeros(0)
    for smoothing, losses in g["loss_per_sample"].items():
        for i, loss in enumerate(losses):
            one = MixedBatch(nothing, a[i : i + 1], b[i : i + 1], lam[i : i + 1], nothing, nothing)
            assert abs(mixed_cross_entropy(logits[i : i + 1], one, float(smoothing)).item() - loss) < 1e-9
    for row in g["dropblock"]:
        gamma = dropblock_gamma(row["keep_prob"], row["block"], row["feat"], row["feat"])
        assert abs(gamma - row["gamma"]) < 1e-9
    for row in g["stochastic_depth_survival"]:
        assert abs(survival_probability(row["block"], row["blocks"], row["drop_last"]) - row["p_survive"]) < 1e-9
    for row in g["shakedrop"]["rows"]:
        p = survival_probability(row["l"], row["L"], 0.5)
        assert abs(p - row["p_l"]) < 1e-9 and ShakeDrop(p).eval()(torch.ones(1, 1, 1, 1)).item() == pytest.approx(p)
