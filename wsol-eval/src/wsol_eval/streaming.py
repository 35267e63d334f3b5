"""What the two evaluators have in common: merging, reducing over ranks, and each image id only once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Streaming(ABC):
    """A metric whose state is additive. Subclasses define reset, update, compute, state_dict and load_state_dict."""

    _ids: dict[str, None]

    @abstractmethod
    def reset(self) -> None:
        """Forget all images."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The additive state and the options."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], add: bool = False) -> None:
        """Take a state over, or add it to this one."""

    def merge(self, *others: Self) -> Self:
        """Add the images of others, such as other ranks; returns self. ValueError if options or ids clash."""
        for other in others:
            self.load_state_dict(other.state_dict(), add=True)
        return self

    def reduce(self, fabric: Fabric) -> Self:
        """Make this the metric over the images of all ranks, on every rank; returns self."""
        if fabric.world_size > 1:
            states: list[Any] = [None] * fabric.world_size
            torch.distributed.all_gather_object(states, self.state_dict())
            self.reset()
            for state in states:
                self.load_state_dict(state, add=True)
        return self

    def check_new(self, ids: Iterable[str]) -> None:
        """ValueError for an id that was added before or appears twice in `ids`."""
        seen = set()
        for name in ids:
            if name in self._ids or name in seen:
                raise ValueError(f"image id {name!r} was added before")
            seen.add(name)
