"""`python -m wsol_eval`."""

from wsol_eval.cli import main

main()
