"""FlexVAR without torch: a bundle goes in, images come out.

The public names are those of `public.py`. They are imported when one of them is first used: imports take a tenth of a
second, in which Ctrl-C must not end the command with a traceback (see `cli/main.py`).
"""

from importlib import import_module

from ._version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes time
    from .public import *  # noqa: F403


def __getattr__(name: str) -> object:
    if name == "__all__" or not name.startswith("__"):
        public = import_module(".public", __name__)
        names = globals()
        names.update({each: getattr(public, each) for each in public.__all__}, __all__=[*public.__all__, "__version__"])
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(".public", __name__).__all__})
