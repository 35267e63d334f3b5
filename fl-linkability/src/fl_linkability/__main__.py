"""`python -m fl_linkability`."""

from fl_linkability.cli import main

main()
