"""Replacing a directory. At every moment, also after a kill, the old or the new one can be opened under its name.

Where the system can, both names are exchanged at once. Elsewhere the old directory is moved to
`.<name>.old-<pid>-<random>` first. If the process is killed then, `restore_directory` moves it back.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from .locks import locked
from .temporary import OLD, name_start, sibling

_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def replace_directory(new: Path, final: Path) -> None:
    """Rename `new` to `final`. The directory that was there gets the name `new`. Both are in one folder.

    Call it while the folder is locked. If it raises OSError, both are as they were.
    """
    if exchange(new, final):
        return
    aside = sibling(final, OLD)
    try:
        os.rename(final, aside)
        os.rename(new, final)
    except BaseException:
        if not os.path.lexists(final) and os.path.lexists(aside):
            os.rename(aside, final)
        raise
    with suppress(FileNotFoundError):  # removed by a writer on another system
        os.rename(aside, new)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once. False where the system or the file system cannot do this."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # slow to import

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = (_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second))
    return int(renameat2(*names, _EXCHANGE)) == 0


def restore_directory(final: Path) -> Path:
    """Give a directory its name back after an interrupted replacement. Returns the path where the directory is.

    This is `final`, or the temporary name if this user cannot write in the folder. If another process is replacing the
    directory, the function waits for it.
    """
    if not find_old(final):
        return final
    with suppress(FileNotFoundError), locked(final.parent):
        for old in find_old(final):
            if os.path.lexists(final):
                break
            try:
                os.rename(old, final)
            except OSError:  # a folder that this user only reads
                return old
    return final


def find_old(final: Path) -> list[Path]:
    """The directories that were moved aside to replace `final`, the newest first."""
    name = re.compile(re.escape(name_start(final, OLD)) + "[0-9]+-[0-9a-f]{12}")
    found = []
    with suppress(OSError), os.scandir(final.parent) as entries:
        found = [e for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        found.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    return [final.parent / entry.name for entry in found]
