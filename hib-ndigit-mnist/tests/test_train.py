"""Training: stacked equals single, a killed run ends bit-equal, ranks share a batch; and what is refused."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.models import HedgedEncoder, MLPEncoder, ModelStack, build_encoder
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import _Run, _warn_if_collapsed, learning_rate, train

SMALL = Training(
    architecture="mlp", hidden=(16,), steps=120, batch=16, pairs=24, lr=3e-3, beta=1e-3, occlusion_p=0.5, samples=4
)


@pytest.fixture(scope="module")
def digits():
    sizes = {"total_train": 1080, "total_test": 450, "min_per_number": 10}
    return ndigit_sets("digits", 1, "instance", ".", **sizes)["train"]


def weights(model):
    parts = [*model.encoder.state_dict().values(), *model.match.state_dict().values()]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    "training",
    [
        SMALL,
        replace(SMALL, components=2, objective="mean_log"),
        replace(SMALL, method="point"),
        replace(SMALL, method="contrastive"),
        replace(SMALL, architecture="lenet", steps=10),
    ],
    ids=lambda t: f"{t.architecture} {t.method} C={t.components}",
)
def test_a_stack_trains_like_single_models(digits, training):
    """Loss and gradients of every step; weights themselves may drift where Adam scales up a rounding error."""
    different, seeds = [training, replace(training, beta=0.1, occlusion_p=0.2), training], [3, 4, 5]
    stack = _Run(digits, different, seeds, "cpu", False)
    singles = [_Run(digits, [own], [seed], "cpu", False) for own, seed in zip(different, seeds, strict=True)]
    for _ in range(3):
        for run in (stack, *singles):
            run.chunk(1)
        for number, single in enumerate(singles):
            torch.testing.assert_close(
                stack.history[-1][1][:, number], single.history[-1][1][:, 0], rtol=1e-3, atol=1e-3
            )
            for ours, theirs in zip(stack.stack.weights, single.stack.weights, strict=True):
                torch.testing.assert_close(ours.grad[number], theirs.grad[0], rtol=1e-3, atol=1e-4)
    losses = stack.history[-1][1][0]
    assert (losses[0] - losses[2]).abs() > 1e-4  # other seeds, other batches


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vmapped_lenet_equals_single_ones(batch_norm):
    encoders = [HedgedEncoder(num_digits=2, components=2, batch_norm=batch_norm) for _ in range(3)]
    stack, x = ModelStack(encoders).train(), torch.rand(3, 8, 1, 28, 56)
    looped = stack(x)
    stack.template.batched_on_cpu = True  # as on CUDA
    torch.testing.assert_close(stack(x), looped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        looped, torch.stack([e.train().outputs(images) for e, images in zip(encoders, x, strict=True)])
    )
    encoder, _ = stack.model(1)
    if not batch_norm:
        torch.testing.assert_close(encoder(x[1]).mu, encoders[1].eval()(x[1]).mu)
    else:  # running statistics of every model moved by its own images
        assert (encoder.body[1].running_mean != 0).any()


def test_it_learns_and_logs(digits):
    (model,), visits = train(
        digits,
        [replace(SMALL, steps=500, hidden=(64,), batch=32)],
        [0],
        visit_at=[100, 200],
        visit=lambda step, models: [step, len(models)],
    )
    assert visits == [[100, 1], [200, 1]]
    assert sum(model.history["loss"][-3:]) / 3 < 0.95 * model.history["loss"][0]
    assert set(model.history) >= {"step", "loss", "kl", "a", "b", "sigma", "sigma_min", "sigma_max", "sigma_variation"}
    assert model.history["sigma_min"][-1] <= model.history["sigma"][-1] <= model.history["sigma_max"][-1]


def test_a_collapsed_variance_is_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr("hib_ndigit_mnist.train.logger.warning", lambda *words: warnings.append(words[0] % words[1:]))
    for variation in ([0.5] * 6, [0.001] * 3 + [0.3] * 3):
        _warn_if_collapsed(variation, SMALL, 0)
    _warn_if_collapsed([0.0] * 6, replace(SMALL, method="point"), 0)
    assert not warnings
    _warn_if_collapsed([0.3] * 3 + [0.01] * 3, SMALL, 4)
    assert "model 4" in warnings[0] and "collapsed" in warnings[0]


CHILD = """
import sys, torch
from pathlib import Path
from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import train
data = ndigit_sets("digits", 1, "instance", ".", total_train=1080, total_test=450, min_per_number=10)["train"]
training = Training(architecture="mlp", hidden=(16,), steps=300, batch=16, pairs=24, lr=3e-3)
models, visits = train(data, [training] * 2, [1, 2], device="cpu", checkpoint=Path(sys.argv[1]), checkpoint_every=50,
                       visit_at=[150], visit=lambda step, models: [float(m.match.b) for m in models])
torch.save([[m.encoder.state_dict() for m in models], [m.history for m in models], visits], sys.argv[2])
"""


def test_sigkill_and_resume_is_bit_equal(tmp_path, monkeypatch):
    def here(name):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / f"{name}.ckpt"), str(tmp_path / name)])
        exec(CHILD, {})

    here("whole")
    words = [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "killed.ckpt", tmp_path / "killed"]
    child, checkpoint = subprocess.Popen(words), tmp_path / "killed.ckpt"
    while not checkpoint.exists():
        time.sleep(0.005)
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < done < 300
    here("killed")
    whole, resumed = (torch.load(tmp_path / name) for name in ("whole", "killed"))
    for ours, theirs in zip(whole[0], resumed[0], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole[1:] == resumed[1:]


def test_ctrl_c_saves(digits, tmp_path):
    class Interrupting:
        def __call__(self, step, models):
            os.kill(os.getpid(), signal.SIGINT)
            return step

    checkpoint = tmp_path / "c.pt"
    options = {"checkpoint": checkpoint, "visit_at": [50], "visit": Interrupting()}
    with pytest.raises(KeyboardInterrupt):
        train(digits, [SMALL], [0], **options)
    assert torch.load(checkpoint, weights_only=True)["step"] == 50
    (resumed,), visits = train(digits, [SMALL], [0], **options)
    assert visits == [50] and torch.equal(weights(resumed), weights(train(digits, [SMALL], [0])[0][0]))
    with pytest.raises(ValueError, match="another run"):
        train(digits, [SMALL], [1], **options)
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        train(digits, [SMALL], [0], **options)


RANK = """
import sys, torch
from hib_ndigit_mnist.data import ndigit_sets
from hib_ndigit_mnist.settings import Training
from hib_ndigit_mnist.train import train
from shared_utils.logging import rank
data = ndigit_sets("digits", 1, "instance", ".", total_train=1080, total_test=450, min_per_number=10)["train"]
training = Training(architecture="mlp", hidden=(16,), steps=20, batch=16, pairs=24, lr=3e-3, components=2)
models, _ = train(data, [training] * 2, [1, 2], device="cpu")
if rank() == 0:
    torch.save([m.encoder.state_dict() | m.match.state_dict() for m in models], sys.argv[1])
"""


def test_two_ranks_train_what_one_process_trains(tmp_path, monkeypatch):
    """This process is rank 0, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    ranks |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    other = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "none")],
        env=os.environ | ranks | {"RANK": "1", "LOCAL_RANK": "1"},
    )
    with monkeypatch.context() as patch:
        for name, value in (ranks | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["-c", str(tmp_path / "two")])
        exec(RANK, {})
        torch.distributed.destroy_process_group()
    assert other.wait() == 0 and not (tmp_path / "none").exists()
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "one")])
    exec(RANK, {})
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_a_step_depends_on_its_random_numbers_alone(digits):
    """What a CUDA graph needs: the same inputs, the same result, whatever the global random state."""
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        run = _Run(digits, [SMALL], [7], "cpu", True)
        outputs.append(run._step(*(part[0] for part in run._draw(1)))[0].loss)
    assert torch.equal(*outputs)


def test_learning_rate_is_a_cosine():
    assert learning_rate(SMALL, 0) == SMALL.lr
    assert abs(learning_rate(SMALL, 60) - (SMALL.lr + SMALL.lr_final) / 2) < 1e-12
    assert abs(learning_rate(SMALL, 120) - SMALL.lr_final) < 1e-12


def test_encoders():
    lenet = HedgedEncoder()
    layers = [layer for layer in lenet.body if list(layer.parameters())]
    assert [tuple(layer.weight.shape) for layer in layers] == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 7 * 7 * 2 * 16)]
    out = lenet(torch.zeros(3, 1, 28, 56, dtype=torch.uint8))
    assert out.mu.shape == out.logvar.shape == (3, 1, 2)
    assert abs(out.logvar - -2).max() < 1e-6  # zero input, zero biases
    assert HedgedEncoder(point=True)(torch.rand(2, 1, 28, 56)).is_point
    assert MLPEncoder(num_digits=2, tile=28, pool=2, components=3)(torch.rand(2, 1, 28, 56)).mu.shape == (2, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lenet(torch.rand(2, 1, 28, 56)).mu.dtype == torch.float32
    for call, message in (
        (lambda: lenet(torch.zeros(3, 1, 28, 28)), r"\(B, 1, 28, 56\)"),
        (lambda: HedgedEncoder(dim=0), "dim: expected >= 1"),
        (lambda: HedgedEncoder(components=2, point=True), "a point embedding has one"),
        (lambda: HedgedEncoder(tile=30), "multiple of 4"),
        (lambda: MLPEncoder(tile=9, pool=2), "multiple of pool"),
        (lambda: build_encoder("vgg"), "architecture"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_settings_that_make_no_sense(digits):
    for options, message in (
        ({"method": "x"}, "method"),
        ({"samples": 7, "components": 2}, "multiple of components"),
        ({"dim": 0}, "dim"),
        ({"beta": -1.0}, "beta"),
        ({"method": "point", "components": 2}, "point embedding"),
        ({"batch": 7}, "even batch"),
        ({"occlusion_p": 2.0}, "occlusion_p"),
    ):
        with pytest.raises(ValueError, match=message):
            Training(**options)
    with pytest.raises(ValueError, match="only beta and occlusion_p"):
        train(digits, [SMALL, replace(SMALL, lr=1.0)], [0, 1])
    with pytest.raises(ValueError, match="a training and a seed per model"):
        train(digits, [SMALL], [0, 1])


def test_no_path_of_the_checkpoint_is_left_half_written(digits, tmp_path):
    train(digits, [SMALL], [0], checkpoint=tmp_path / "deep" / "c.pt")
    assert [path.name for path in Path(tmp_path / "deep").iterdir()] == ["c.pt"]
