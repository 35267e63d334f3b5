"""`python -m rebias`."""

from rebias.cli import main

main()
