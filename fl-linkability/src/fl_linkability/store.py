"""Every update of every round: what the adversary on the server keeps. In memory, or appended to files on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from fl_linkability.features import leave_one_out, unit
from shared_utils.files import whole_file

COLUMNS = ("round", "device", "user", "role", "n_examples")


class UpdateStore:
    """Updates (n, D) float32 with round, device, user, role (0 prior, 1 anonymous) and n_examples of each.

    `device`, `user` and `role` are labels for the evaluation; an attack gets only `features`.

    Args:
        layer_slices: start and end of each layer in an update.
        path: folder for delta.f32 and index.i64; None keeps everything in memory. An existing folder is opened.

    Raises:
        ValueError: a folder that holds updates of another network, or damaged files.
    """

    def __init__(self, layer_slices: dict[str, tuple[int, int]], path: Path | None = None):
        self.layer_slices = {name: tuple(span) for name, span in layer_slices.items()}
        self.dimension = max(end for _, end in self.layer_slices.values())
        self.path = Path(path) if path else None
        self._deltas: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        if self.path:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_meta(self.path)

    @classmethod
    def open(cls, path: Path) -> UpdateStore:
        """Open a store on disk. FileNotFoundError if there is none."""
        meta = Path(path) / "meta.json"
        if not meta.is_file():
            raise FileNotFoundError(f"{path}: no update store (meta.json is missing)")
        return cls(json.loads(meta.read_text())["layers"], path)

    def _check_meta(self, path: Path) -> None:
        meta, layers = path / "meta.json", {name: list(span) for name, span in self.layer_slices.items()}
        if not meta.exists():
            with whole_file(meta) as temporary:
                temporary.write_text(json.dumps({"layers": layers}))
        elif json.loads(meta.read_text())["layers"] != layers:
            raise ValueError(f"{path}: holds updates of another network; delete it or name another folder")

    def append(self, deltas: np.ndarray, **columns: np.ndarray | int) -> None:
        """Add updates (k, D); round, device, user, role and n_examples are (k,) or one number for all."""
        deltas = np.ascontiguousarray(deltas, dtype=np.float32)
        if deltas.ndim != 2 or deltas.shape[1] != self.dimension:
            raise ValueError(f"updates must be (k, {self.dimension}), got {deltas.shape}")
        index = np.stack([np.broadcast_to(np.asarray(columns[name], np.int64), len(deltas)) for name in COLUMNS], 1)
        if self.path is None:
            self._deltas.append(deltas)
            self._index.append(index)
            return
        for name, part in (("delta.f32", deltas), ("index.i64", np.ascontiguousarray(index))):
            with open(self.path / name, "ab") as file:
                file.write(part.tobytes())

    def truncate(self, n: int) -> None:
        """Forget all but the first n updates (after a kill: those in the last checkpoint)."""
        if len(self) < n:
            raise ValueError(f"{self.path or 'the store'} holds {len(self)} updates, but the checkpoint counts {n}")
        if self.path is None:
            delta, index = self.delta[:n], self.index[:n]
            self._deltas, self._index = [delta], [index]
        elif n or (self.path / "delta.f32").exists():
            os.truncate(self.path / "delta.f32", n * self.dimension * 4)
            os.truncate(self.path / "index.i64", n * len(COLUMNS) * 8)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def delta(self) -> np.ndarray:
        """(n, D) float32; a read-only memory map if the store is on disk."""
        if self.path is None:
            if len(self._deltas) != 1:
                whole = np.concatenate(self._deltas) if self._deltas else np.zeros((0, self.dimension), np.float32)
                self._deltas = [whole]
            return self._deltas[0]
        if len(self) == 0:
            return np.zeros((0, self.dimension), np.float32)
        return np.memmap(self.path / "delta.f32", np.float32, "r", shape=(len(self), self.dimension))

    @property
    def index(self) -> np.ndarray:
        """(n, 5) int64, columns as in COLUMNS; as many rows as both files hold completely."""
        if self.path is None:
            if len(self._index) != 1:
                self._index = [np.concatenate(self._index) if self._index else np.zeros((0, len(COLUMNS)), np.int64)]
            return self._index[0]
        file, deltas = self.path / "index.i64", self.path / "delta.f32"
        if not file.exists() or not deltas.exists():
            return np.zeros((0, len(COLUMNS)), np.int64)
        n = min(file.stat().st_size // (8 * len(COLUMNS)), deltas.stat().st_size // (4 * self.dimension))
        return np.fromfile(file, np.int64, n * len(COLUMNS)).reshape(n, len(COLUMNS))

    def column(self, name: str) -> np.ndarray:
        """(n,) of round, device, user, role or n_examples."""
        return self.index[:, COLUMNS.index(name)]

    def features(self, layers: str = "all", center: str = "none", normalize: bool = True) -> np.ndarray:
        """What an attack sees, float64 (n, d).

        Args:
            layers: "all", or a prefix of parameter names, such as "fc2".
            center: "none" (the paper), or "leave-one-out" (minus the mean of the round's other updates).
            normalize: to unit length.
        """
        if center not in ("none", "leave-one-out"):
            raise ValueError(f"center must be none or leave-one-out, got {center!r}")
        spans = [span for name, span in self.layer_slices.items() if layers == "all" or name.startswith(layers)]
        if not spans:
            raise ValueError(f"no layer begins with {layers!r}; the layers are {', '.join(self.layer_slices)}")
        vectors = np.concatenate([self.delta[:, a:b] for a, b in spans], axis=1)
        if center == "leave-one-out":
            vectors = leave_one_out(vectors, self.column("round"))
        return unit(vectors) if normalize else np.asarray(vectors, np.float64)
