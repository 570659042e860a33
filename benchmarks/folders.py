"""Write folders atomically, as `onelora_diffusion.files` writes files."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from onelora_diffusion.files import beside, flush_to_disk


@contextlib.contextmanager
def folder_written_beside(path: Path) -> Iterator[Path]:
    """Context manager that yields an empty temporary folder to fill; at the end it is flushed and replaces `path`.

    A link is followed. A folder that is a mount point stays, and its content is replaced.

    Raises:
        OSError: as `written_beside`.
    """
    path = path.resolve() if path.is_symlink() else path
    with beside(path) as part:
        part.mkdir(parents=True)
        yield part
        for written in (*part.rglob("*"), part):
            flush_to_disk(written)
        shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():
            for written in part.iterdir():
                shutil.move(written, path)
            flush_to_disk(path)
        else:
            os.rename(part, path)
        flush_to_disk(path.parent)
