"""Encoders: a small LeNet like the paper's and an MLP for small scales; and several models stacked in one module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from hib_ndigit_mnist.embedding import LOGVAR_RANGE, GaussianMixtureEmbedding, default_logvar
from hib_ndigit_mnist.hedging import MatchProbability


class HedgedHead(nn.Linear):
    """Turns the features of any backbone into an embedding: one linear layer for means and log variances.

    For example `HedgedHead(model.num_features, dim=64)` after `timm.create_model(name, num_classes=0)`; train both
    with `VIBPairLoss`. It computes in float32 under autocast.

    Args:
        features: width of the backbone's output.
        dim: D.
        components: C.
        point: no variance: C * D outputs instead of 2 * C * D.
        logvar_bias: initial log variance; None takes `default_logvar`. If it is too small, the variance never depends
            on the input, because its gradient is proportional to the variance.

    Raises:
        ValueError: a size below 1, a point with several components.
    """

    def __init__(
        self, features: int, dim: int = 2, components: int = 1, point: bool = False, logvar_bias: float | None = None
    ):
        for name, value in (("features", features), ("dim", dim), ("components", components)):
            if value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        if point and components > 1:
            raise ValueError(f"components: a point embedding has one, got {components}")
        super().__init__(features, components * dim * (1 if point else 2))
        self.dim, self.components, self.point = dim, components, point
        self.logvar_bias = default_logvar(dim) if logvar_bias is None else logvar_bias
        self.reset_bias()

    def reset_bias(self) -> None:
        """Biases: zeros for the means, the initial value for the log variances."""
        nn.init.zeros_(self.bias)
        if not self.point:
            nn.init.constant_(self.bias[self.components * self.dim :], self.logvar_bias)

    def outputs(self, features: Tensor) -> Tensor:
        """(B, features) -> raw outputs (B, C D) or (B, 2 C D), in the precision of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))

    def split(self, outputs: Tensor) -> GaussianMixtureEmbedding:
        """Raw outputs (..., B, C D or 2 C D) -> the embedding; the log variance is clamped to [-14, 6]."""
        parts = outputs.unflatten(-1, (-1, self.components, self.dim))
        mu = parts[..., 0, :, :]
        return GaussianMixtureEmbedding(mu, None if self.point else parts[..., 1, :, :].clamp(*LOGVAR_RANGE))

    def forward(self, features: Tensor) -> GaussianMixtureEmbedding:  # type: ignore[override]
        """(B, features) -> the embedding (B, C, D); ValueError for another shape."""
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features: expected (B, {self.in_features}), got {tuple(features.shape)}")
        return self.split(self.outputs(features))


class Encoder(nn.Module):
    """Base of the encoders: input check, heads, initialisation (Xavier-uniform weights, zero biases).

    Mean and variance share everything before the last layer, which has C * D outputs for a point and 2 * C * D
    otherwise. It computes in float32 under autocast.

    Args:
        features: width of the last hidden layer.
        num_digits: N, so that images are (tile, N tile).
        dim: D.
        components: C.
        point: no variance.
        tile: side of a digit in pixels.
        logvar_bias: see `HedgedHead`.

    Raises:
        ValueError: a size below 1, a point with several components.
    """

    body: nn.Module
    batched_on_cpu = True  # whether stacked models run faster as one batched operation on a CPU, too

    def __init__(
        self,
        features: int,
        num_digits: int,
        dim: int,
        components: int,
        point: bool,
        tile: int,
        logvar_bias: float | None,
    ):
        super().__init__()
        for name, value in (("num_digits", num_digits), ("tile", tile)):
            if value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        self.shape, self.dim, self.components, self.point = (1, tile, tile * num_digits), dim, components, point
        self.head = HedgedHead(features, dim, components, point, logvar_bias)

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.head.reset_bias()

    def outputs(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) floating in [0, 1] -> raw outputs of the heads (B, C D) or (B, 2 C D), float32."""
        return self.head.outputs(self.body(x))

    def forward(self, x: Tensor) -> GaussianMixtureEmbedding:
        """Embed images.

        Args:
            x: (B, 1, H, W), uint8 or floating in [0, 1]; H = tile, W = N tile.

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"x: expected (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return self.head.split(self.outputs(to_unit(x, self.head.weight.dtype)))


class HedgedEncoder(Encoder):
    """LeNet: two 5 x 5 convolutions with ReLU and 2 x 2 max pooling, one hidden layer, two linear heads.

    Args:
        num_digits: N.
        dim: D.
        components: C.
        point: point embedding, no variance.
        width: channels of the two convolutions.
        hidden: units of the fully connected layer.
        batch_norm: after both convolutions and the hidden layer.
        tile: side of a digit in pixels, a multiple of 4.
        logvar_bias: see `HedgedHead`.
    """

    batched_on_cpu = False  # a grouped convolution takes twice the time of single ones

    def __init__(
        self,
        num_digits: int = 2,
        dim: int = 2,
        components: int = 1,
        point: bool = False,
        width: Sequence[int] = (6, 16),
        hidden: int = 120,
        batch_norm: bool = False,
        tile: int = 28,
        logvar_bias: float | None = None,
    ):
        super().__init__(hidden, num_digits, dim, components, point, tile, logvar_bias)
        if tile % 4:
            raise ValueError(f"tile: expected a multiple of 4 (two poolings halve it), got {tile}")
        layers: list[nn.Module] = []
        channels = 1
        for count in width:
            layers.append(nn.Conv2d(channels, count, 5, padding=2))
            layers += [nn.BatchNorm2d(count)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels = count
        layers += [nn.Flatten(), nn.Linear(channels * (tile // 4) ** 2 * num_digits, hidden)]
        layers += [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.body = nn.Sequential(*layers, nn.ReLU())
        self._initialise()


class MLPEncoder(Encoder):
    """Average pooling and fully connected ReLU layers: the encoder of the small scales on a CPU.

    Args:
        num_digits: N.
        dim: D.
        components: C.
        point: point embedding, no variance.
        hidden: units of the layers.
        pool: side of the average pooling.
        tile: side of a digit in pixels, a multiple of `pool`.
        logvar_bias: see `HedgedHead`.
    """

    def __init__(
        self,
        num_digits: int = 1,
        dim: int = 2,
        components: int = 1,
        point: bool = False,
        hidden: Sequence[int] = (128, 64),
        pool: int = 1,
        tile: int = 8,
        logvar_bias: float | None = None,
    ):
        super().__init__(hidden[-1], num_digits, dim, components, point, tile, logvar_bias)
        if tile % pool:
            raise ValueError(f"tile: expected a multiple of pool = {pool}, got {tile}")
        layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
        layers.append(nn.Flatten())
        inputs = (tile // pool) ** 2 * num_digits
        for units in hidden:
            layers += [nn.Linear(inputs, units), nn.ReLU()]
            inputs = units
        self.body = nn.Sequential(*layers)
        self._initialise()


ARCHITECTURES = {"lenet": HedgedEncoder, "mlp": MLPEncoder}


def build_encoder(architecture: str, **options: Any) -> Encoder:
    """Build an encoder by name; ValueError for an unknown name."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    return ARCHITECTURES[architecture](**options)


def to_unit(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> [0, 1]; floating-point values are not changed. TypeError for other integers."""
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"images: expected uint8, or floating-point values in [0, 1], got {x.dtype}")
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


class ModelStack(nn.Module):
    """M models of one architecture with their a and b, trained together: parameters (M, ...), images (M, B, 1, H, W).

    Every model has its own images and parameters. At this size a training step is launch-bound, so M models cost
    little more than one.

    Args:
        encoders: all of the same architecture.
    """

    template: Encoder

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
        weights, buffers = stack_module_state(list(encoders))
        self.names = list(weights), list(buffers)
        self.weights = nn.ParameterList(nn.Parameter(w.detach()) for w in weights.values())
        for number, buffer in enumerate(buffers.values()):
            self.register_buffer(f"buffer_{number}", buffer)
        self.match = MatchProbability(torch.ones(len(encoders)), torch.ones(len(encoders)))
        # without weights, so not a submodule
        object.__setattr__(self, "template", copy.deepcopy(encoders[0]).to("meta"))

    def __len__(self) -> int:
        return len(self.match.b)

    def forward(self, x: Tensor) -> Tensor:
        """Images (M, B, 1, H, W) floating -> raw outputs (M, B, ...); see `HedgedHead.split`."""
        state = self._state()
        if x.is_cuda or (len(self) > 1 and self.template.batched_on_cpu):
            return torch.func.vmap(lambda own, images: _outputs(self.template, own, images))(state, x)
        each = [{name: value[number] for name, value in state.items()} for number in range(len(self))]
        return torch.stack([_outputs(self.template, own, images) for own, images in zip(each, x, strict=True)])

    def embedding(self, outputs: Tensor) -> GaussianMixtureEmbedding:
        """(M, B, C, D) from raw outputs."""
        return self.template.head.split(outputs)

    def model(self, number: int) -> tuple[Encoder, MatchProbability]:
        """A copy of one model on the CPU, in eval mode."""
        encoder = copy.deepcopy(self.template).to_empty(device="cpu")
        encoder.load_state_dict({name: value[number].detach().cpu() for name, value in self._state().items()})
        match = MatchProbability(1.0, 1.0, self.match.eps)
        match.load_state_dict({name: value[number].cpu() for name, value in self.match.state_dict().items()})
        return encoder.eval(), match.eval()

    def train(self, mode: bool = True) -> ModelStack:
        self.template.train(mode)
        return super().train(mode)

    def _state(self) -> dict[str, Tensor]:
        buffers = {name: getattr(self, f"buffer_{number}") for number, name in enumerate(self.names[1])}
        return dict(zip(self.names[0], self.weights, strict=True)) | buffers


def _outputs(template: Encoder, state: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(_Outputs(template), {f"encoder.{name}": value for name, value in state.items()}, (x,))


class _Outputs(nn.Module):
    """`functional_call` calls forward; training needs the raw outputs."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.outputs(x)
