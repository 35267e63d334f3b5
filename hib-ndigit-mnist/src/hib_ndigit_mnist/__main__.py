"""`python -m hib_ndigit_mnist`."""

from hib_ndigit_mnist.cli import main

main()
