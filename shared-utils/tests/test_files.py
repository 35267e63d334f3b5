"""Files that are whole or not there, on a disk that takes no more."""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from shared_utils.files import whole_file
from shared_utils.runlog import RunLog

RECORD = {"table": "t", "row": "r", "scale": "smoke", "seed": 0, "settings_hash": "0", "metrics": {"x": 1.0}}


@contextmanager
def no_file_above(size):
    """Writes beyond `size` bytes of a file fail with an OSError, as on a full disk."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("kind", ["text", "checkpoint"])
def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path, kind):
    def write(n):
        with whole_file(tmp_path / "new folder" / "file") as temporary:
            if kind == "text":
                temporary.write_text("x" * n)
            else:
                torch.save({"weights": torch.ones(n, dtype=torch.uint8)}, temporary)

    write(100)
    before = (tmp_path / "new folder" / "file").read_bytes()
    with (
        no_file_above(20_000),
        pytest.raises(OSError, match=r"new folder/file: cannot be written \(.*make room") as error,
    ):
        write(100_000)
    assert "\n" not in str(error.value)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new folder").iterdir()] == [("file", before)]


def test_a_mistake_in_the_block_stays_itself(tmp_path):
    with pytest.raises(TypeError, match="not writable"), whole_file(tmp_path / "file"):
        raise TypeError("not writable")
    assert not list(tmp_path.iterdir())


def test_a_run_log_on_a_full_disk_is_as_it_was(tmp_path):
    log = RunLog(tmp_path / "smoke.jsonl")
    log.append(RECORD)
    size = log.path.stat().st_size
    with no_file_above(size + 20), pytest.raises(OSError, match=r"smoke\.jsonl: cannot be written"):
        log.append(RECORD | {"seed": 1})
    assert log.path.stat().st_size == size
    assert log.append(RECORD | {"seed": 1}) == 1 and len(log.records()) == 2
