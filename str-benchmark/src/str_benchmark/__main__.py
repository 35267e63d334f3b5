"""`python -m str_benchmark`."""

from str_benchmark.cli import main

main()
