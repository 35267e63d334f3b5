"""Run by torchrun from test_golden.py."""

import warnings

import torch.distributed as dist
from test_golden import CASES, check

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
for case in CASES:
    check(case, tile=64)
print(f"{len(CASES)} fixtures equal", flush=True)
dist.destroy_process_group()
