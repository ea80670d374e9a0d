"""What a failure of a library means: too little memory, a limit of the machine, or a graph that cannot run.

The files of a bundle were checked before a library opened them. So an error names the graph as the cause only if the
text of the library does. An unknown failure is reported as one of the machine.
"""

from __future__ import annotations

import re

from ..errors import ArtifactRefused, EnvironmentFailed, FlexVARError
from ..machine.threads import FEWER_THREADS
from .base import EXPORT_AGAIN, no_memory

_PATHS = re.compile(r"\S*/\S*")  # the words of a path say nothing about the cause
_THREADS = re.compile(r"pthread_create|Resource temporarily unavailable|(?:create|start) (?:a |new )*thread", re.I)
_MEMORY = re.compile(r"bad[_ ]alloc|out of memory|(?:can't|cannot|could not|failed to|unable to) alloc", re.I)
_MACHINE = re.compile(
    r"system error|No such file|NO_SUCHFILE|does(?:n't| not) exist|could not open|cannot open|can ?not load library|"
    r"too many open files|permission denied|input/output error|regular file|file mapping|mmap|map segment|"
    r"Available frontends(?!.*\bonnx\b)",
    re.I,
)
_GRAPH = re.compile(
    r"\b(?:node|op|operator|opset|tensor|initializer|shapes?|graph|protobuf|parsed|dimensions?|IR version)\b|"
    r"OpConversionFailure|externally stored data|outside the base directory|ShapeInference|INVALID_GRAPH|"
    r"Available frontends",
    re.I,
)


def failure(library: str, name: str, error: BaseException, reason: str) -> FlexVARError:
    """The error to raise for what a library raised. name: of the graph. reason: one line of the library's text.

    It is OutOfMemory, EnvironmentFailed or ArtifactRefused.
    """
    text, reason = _PATHS.sub(" ", " ".join(str(error).split())), reason.removesuffix(".")
    if _THREADS.search(text):
        return EnvironmentFailed(
            f"{library} cannot start its threads for {name}: {reason}.",
            expected="a system that starts the threads",
            fix=FEWER_THREADS,
        )
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return no_memory(name, reason)
    if _MACHINE.search(text):
        return EnvironmentFailed(
            f"{library} cannot open the files of {name}: {reason}.",
            expected="files that can be opened",
            fix="Check that the bundle still exists, and that ulimit -a shows no limit that is too low.",
        )
    if _GRAPH.search(text):
        expected = f"a graph that this {library} can run"
        return ArtifactRefused(f"{library} cannot run {name}: {reason}.", expected=expected, fix=EXPORT_AGAIN)
    return EnvironmentFailed(
        f"{library} failed while it worked on {name}, for an unknown reason: {reason}.",
        expected="a library that works on this machine",
        fix="Run flexvar doctor, or use another backend.",
    )
