"""`python -m satrn`."""

from satrn.cli import main

main()
