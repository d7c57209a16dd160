"""Errors are raised in processes of their own too."""

from __future__ import annotations

import pickle

import pytest

from trimtab import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("no such folder"),
        errors.MissingDependency("torch", "compile"),
        errors.MissingDependency("onnxruntime", "", "run pip install onnxruntime"),
    ],
)
def test_an_error_comes_back_from_another_process_as_it_was(error: errors.TrimtabError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)
