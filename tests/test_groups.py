"""Tests of one group run on one worker: scattered, each worker would make what they share again, unnoticed."""

from __future__ import annotations

import pytest
from conftest import IS_WORKER


@pytest.mark.xdist_group("dit")
@pytest.mark.skipif(not IS_WORKER, reason="one process runs all tests")
def test_xdist_knows_the_group_of_a_test(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@dit")
