"""The errors: their exit codes, their text, and their way between processes."""

from __future__ import annotations

import pickle

import pytest

from flexvar_ref import errors
from flexvar_ref.errors import FlexVARRefError

EXIT_CODES = {
    errors.InvalidInput: 2,
    errors.CheckpointError: 5,
    errors.TrainingError: 2,
    errors.ConfigError: 2,
    errors.MissingExtra: 4,
    errors.Unsupported: 4,
    errors.DataError: 5,
    errors.RunRefused: 5,
}


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_errors_have_an_exit_code_and_survive_pickling(kind: type[FlexVARRefError]) -> None:
    """A worker process that fails sends its error to the main process."""
    error = pickle.loads(pickle.dumps(kind("size is 0.", expected="at least 1", fix="Choose another size.")))
    assert type(error) is kind and isinstance(error, ValueError) and error.exit_code == EXIT_CODES[kind]
    assert (error.got, error.expected, error.fix) == ("size is 0.", "at least 1", "Choose another size.")
    assert str(error) == "size is 0. Choose another size."


def test_every_error_is_in_the_table() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FlexVARRefError)}
    assert kinds == {FlexVARRefError, *EXIT_CODES}
