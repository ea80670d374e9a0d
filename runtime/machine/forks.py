"""What a child process does with native objects that it inherits from a fork.

The threads of a library stay in the parent. If the child frees an object of the library, the library waits for them
for ever. So the child never frees such an object, not even when it ends.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def never_free_in_children(owner: object) -> None:
    """Keep an object, and all that it refers to, alive in every child that is forked while the object exists."""
    _owners.add(owner)


def never_free(owner: object) -> None:
    """Keep an object, and all that it refers to, alive until this process has ended."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))  # a reference that nobody gives back


def _keep() -> None:
    for owner in list(_owners):
        never_free(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep)
