"""The MLP's local training in JAX, for the benchmark: FedJAX itself, and a whole round in one compiled call.

Neither jax nor fedjax is a dependency; both functions take what `train_batched` takes and give its updates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from fl_linkability.train import State

Work = Callable[[Tensor, Tensor], np.ndarray]  # from rows and weights of `batch_table` to updates (K, D)
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # before jax is imported: one thread, as ours


def whole_round(state: State, x: Tensor, y: Tensor, lr: float) -> Work:
    """A scan over the batches, vmapped over the clients and compiled: FedJAX's approach, taken further."""
    jax = import_module("jax")
    params, images, classes = _arrays(state, x, y)

    def client(params: Any, rows: Any, weights: Any) -> Any:
        def step(params: Any, batch: Any) -> tuple[Any, None]:
            rows, weights = batch
            gradient = jax.grad(_loss)(params, images[rows], classes[rows], weights)
            return jax.tree.map(lambda p, g: p - lr * g, params, gradient), None

        after, _ = jax.lax.scan(step, params, (rows, weights))
        return jax.tree.map(lambda new, old: new - old, after, params)

    everyone = jax.jit(jax.vmap(client, in_axes=(None, 0, 0)))

    def work(rows: Tensor, weights: Tensor) -> np.ndarray:
        deltas = everyone(params, rows.numpy().astype(np.int32), weights.numpy())
        return np.concatenate([np.asarray(deltas[name]).reshape(len(rows), -1) for name in state], 1)

    return work


def fedjax_round(state: State, x: Tensor, y: Tensor, lr: float) -> Work:
    """FedJAX's own per-client training on its default backend: one compiled step per batch."""
    jax, fedjax, fed_avg = map(import_module, ("jax", "fedjax", "fedjax.algorithms.fed_avg"))
    params, images, classes = _arrays(state, x, y)

    def gradient(params: Any, batch: Any, key: Any) -> Any:
        return jax.grad(_loss)(params, images[batch["rows"]], classes[batch["rows"]], batch["weights"])

    train, key = fed_avg.create_train_for_each_client(gradient, fedjax.optimizers.sgd(lr)), jax.random.PRNGKey(0)

    def work(rows: Tensor, weights: Tensor) -> np.ndarray:
        batches = zip(rows.numpy().astype(np.int32), weights.numpy(), strict=True)
        clients = [
            (number, [{"rows": r, "weights": w} for r, w in zip(*each, strict=True)], key)
            for number, each in enumerate(batches)
        ]
        found = dict(train(params, clients))  # old minus new
        return -np.stack([np.concatenate([np.ravel(found[k][name]) for name in state]) for k in range(len(rows))])

    return work


def _arrays(state: State, x: Tensor, y: Tensor) -> tuple[dict[str, Any], Any, Any]:
    jnp = import_module("jax.numpy")
    params = {name: jnp.asarray(value.numpy()) for name, value in state.items()}
    return params, jnp.asarray(x.flatten(1).numpy()), jnp.asarray(y.numpy().astype(np.int32))


def _loss(params: Any, x: Any, y: Any, weights: Any) -> Any:
    """Weighted cross-entropy of `models.MLP` on one batch."""
    jax = import_module("jax")
    hidden = jax.nn.relu(x @ params["fc1.weight"].T + params["fc1.bias"])
    log_p = jax.nn.log_softmax(hidden @ params["fc2.weight"].T + params["fc2.bias"])
    return -(jax.numpy.take_along_axis(log_p, y[:, None], 1)[:, 0] * weights).sum()
