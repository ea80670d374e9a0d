"""The class of a request."""

from __future__ import annotations

import re
from difflib import get_close_matches

from flexvar_runtime.checks import shown
from flexvar_runtime.model.class_names import labels_named

from ..errors import HTTPError, conflict
from .fields import Fields
from .model import Model


def parse_class(model: Model, fields: Fields, edits: bool) -> int:
    """The class: class_id, or prompt as a number or a name. An edit with an empty prompt has no class."""
    facts = model.manifest.model
    known = f"a whole number from 0 to {facts.null_class} ({facts.null_class} means no class)"
    if fields.class_id is not None:
        if fields.prompt not in (None, ""):
            raise conflict("class_id", "prompt")
        if fields.class_id > facts.null_class:
            got = f"class_id is {shown(fields.class_id)}, but it must be {known}."
            raise HTTPError(400, got, "invalid_value", "class_id")
        return fields.class_id
    prompt = "" if fields.prompt is None else str(fields.prompt).strip()
    if not prompt:
        if edits:
            return facts.null_class
        got = "prompt is missing. Send the name or number of a class. GET /v1/models lists them."
        raise HTTPError(400, got, "missing_value", "prompt")
    if prompt.isascii() and prompt.isdecimal() and len(prompt) < 10 and int(prompt) <= facts.null_class:
        return int(prompt)
    names = facts.class_names or ()
    found = labels_named(prompt, names)
    if len(found) == 1:
        return found[0]
    if found:
        got = f"prompt is {shown(prompt)}, and {len(found)} classes have this name. Send one of their numbers: {found}."
        raise HTTPError(400, got, "invalid_value", "prompt")
    lower = {name.casefold(): name for name in names}
    words = set(re.findall(r"\w{3,}", prompt.casefold()))
    sharing = sorted(names, key=lambda name: len(words.intersection(name.casefold().split())), reverse=True)[:3]
    close = [lower[name] for name in get_close_matches(prompt.casefold(), lower, n=3)] or sharing
    examples = f", or a name such as {', '.join(map(repr, close))}" if close else ""
    got = f"prompt is {shown(prompt)}, which is not a class of this model. The model takes classes, not text."
    fix = f"Send {known}{examples}. GET /v1/models lists them."
    raise HTTPError(400, f"{got} {fix}", "unknown_class", "prompt")
