"""Run by torchrun from test_train.py: two ranks train and evaluate; rank 0 prints what they agree on."""

import json
import sys

import torch
from resumable import plain_block

from wsol_eval.cutouts import make_split
from wsol_eval.evaluate import evaluate
from wsol_eval.models import small
from wsol_eval.recipe import Recipe
from wsol_eval.sources import MemorySource
from wsol_eval.train import fit, make_fabric

torch.set_num_threads(1)
small.block = plain_block  # batch normalisation sees its own rank's images: two ranks are not one then
fabric = make_fabric("cpu")
recipe = Recipe(arch="small", feature_map=8, lr=0.02, epochs=2, lr_decay_frequency=2, batch_size=16)
network = fit(recipe, MemorySource(make_split("train", 48, 1)), 3, fabric)
report = evaluate(network, MemorySource(make_split("test", 31, 1)), fabric, 0.05, batch_size=4)
weights = torch.cat([p.detach().flatten() for p in network.parameters()])
both = fabric.all_gather(weights)
if fabric.is_global_zero:
    torch.save(weights, sys.argv[1])
    print(json.dumps({"equal": bool((both[0] == both[1]).all()), "n": report.n, "metrics": report.metrics()}))
