"""`python -m prdc_metrics`."""

from prdc_metrics.cli import main

main()
