"""Import of ONNX Runtime and OpenVINO without their telemetry.

By default both libraries keep an identifier in the user's home directory and send events to their makers. Each reads
its setting when it is imported, so no other module imports them.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
"""The only way to keep ONNX Runtime from starting its telemetry is this environment variable."""
_OPENVINO_SENDER = "openvino_telemetry"
_importing = threading.Lock()


def load_onnxruntime() -> Any:
    """The module onnxruntime. If the user has set ORT_DISABLE_TELEMETRY, to whatever value, it stays as it is.

    Raises whatever importing a missing or damaged wheel raises.
    """
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    return importlib.import_module("onnxruntime")


def telemetry() -> dict[str, str]:
    """Whether each library may send its telemetry when this package runs it: "off", or why it may be on."""
    switch = os.environ.get(TELEMETRY_SWITCH, "1")
    return {"onnxruntime": "off" if switch == "1" else f"{TELEMETRY_SWITCH}={switch}", "openvino": "off"}


def load_openvino() -> Any:
    """The module openvino. It does not find the package that sends its events, and then it sends none.

    OpenVINO's own opt-out would write a file to the home directory. Raises whatever importing a missing or damaged
    wheel raises.
    """
    with _importing:
        if "openvino" in sys.modules:
            return importlib.import_module("openvino")
        sender = sys.modules.get(_OPENVINO_SENDER)
        sys.modules[_OPENVINO_SENDER] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            return importlib.import_module("openvino")
        finally:
            if sender is None:
                del sys.modules[_OPENVINO_SENDER]
            else:
                sys.modules[_OPENVINO_SENDER] = sender
