"""Run as a subprocess by the tests: a training or a search that is killed. Arguments: fit|search, folder, kill at."""

import os
import signal
import sys
from pathlib import Path

import torch
from wsol_eval.scenes import make_split

from wsol_eval import protocol, train
from wsol_eval.data import SceneSource
from wsol_eval.recipe import Recipe

RECIPE = Recipe(arch="small", method="cutmix", feature_map=8, lr=0.02, epochs=2, lr_decay_frequency=2, batch_size=16)


def die_after(function, calls):
    """Kill this process, for real, right after that many calls."""
    made = []

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def main(what: str, folder: Path, kill_at: int) -> None:
    torch.set_num_threads(1)
    fabric, scenes = (
        train.make_fabric("cpu"),
        {n: SceneSource(make_split(n, 48, 1), n) for n in ("train", "val", "test")},
    )
    if what == "fit":
        train._save = die_after(train._save, kill_at)
        network = train.fit(RECIPE, scenes["train"], 3, fabric, folder / "model.pt", checkpoint_every=2)
        torch.save(network.state_dict(), folder / "weights.pt")
    else:
        protocol.Ledger.add = die_after(protocol.Ledger.add, kill_at)
        protocol.run_in_folder(RECIPE, "scenes", 3, 7, scenes, fabric, folder, "max_box_acc_v2", 0.05)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
