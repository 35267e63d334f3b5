"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary name next to `path` to write to. It becomes `path` when the block ends, and is removed if it fails.

    If the process is killed, the old file or the new one is there; processes that write the same file do not disturb
    each other. Folders are created.

    Raises:
        OSError: the file cannot be written; names the file, the reason and the free space. It replaces the RuntimeError
            that torch.save raises on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> OSError:
    """The error of `whole_file` for a file that could not be written."""
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    free = shutil.disk_usage(path.parent).free / 2**20
    return OSError(f"{path}: cannot be written ({reason}; {free:,.0f} MB are free there); make room, then run it again")
