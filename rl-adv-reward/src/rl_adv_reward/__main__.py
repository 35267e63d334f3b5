"""`python -m rl_adv_reward`."""

from rl_adv_reward.cli import main

main()
