"""One table of `make rehearse`, end to end: tiny archives, preflight, run, record, verdicts, page."""

from pathlib import Path

from shared_utils.rehearsal import rehearse


def test_a_table_on_masks_is_rehearsed():
    (found,) = rehearse(Path(__file__).parents[1], ["table-2-openimages"])
    assert found.passed, found.problem
