"""`python -m cutmix_robustness`."""

from cutmix_robustness.cli import main

main()
