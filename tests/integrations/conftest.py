"""What tests of integrations share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def silent_olive() -> Iterator[None]:
    """Keep Olive from reporting over the network, which its own switches do not do entirely."""
    if importlib.util.find_spec("olive") is None:
        yield
        return
    from olive.telemetry import Telemetry

    silent = object.__new__(Telemetry)
    silent._initialized, silent._logger, silent._cache_handler = True, None, None
    before, Telemetry._instance = Telemetry._instance, silent
    yield
    Telemetry._instance = before
