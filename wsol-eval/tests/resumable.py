"""Run as a subprocess by the tests: a training or a search that is killed. Arguments: fit|search, folder, kill at."""

import os
import signal
import sys
from pathlib import Path

import torch

from wsol_eval import protocol, train
from wsol_eval.cutouts import make_split
from wsol_eval.recipe import Recipe
from wsol_eval.sources import MemorySource

RECIPE = Recipe(arch="small", method="cutmix", feature_map=8, lr=0.02, epochs=2, lr_decay_frequency=2, batch_size=16)


def plain_block(inputs, outputs, stride=1):
    """The small network's block without normalisation."""
    return torch.nn.Sequential(torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1), torch.nn.ReLU())


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
    fabric, digits = (
        train.make_fabric("cpu"),
        {n: MemorySource(make_split(n, 48, 1), n) for n in ("train", "val", "test")},
    )
    if what == "fit":
        train._save = die_after(train._save, kill_at)
        network = train.fit(RECIPE, digits["train"], 3, fabric, folder / "model.pt", checkpoint_every=2)
        torch.save(network.state_dict(), folder / "weights.pt")
    else:
        protocol.Ledger.add = die_after(protocol.Ledger.add, kill_at)
        protocol.run_in_folder(RECIPE, "photographs", 3, 7, digits, fabric, folder, "max_box_acc_v2", 0.05)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
