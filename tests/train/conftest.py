"""What the tests of the real loop share: a process left as it was found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from train.in_process import process_as_it_was


@pytest.fixture
def left_as_it_was() -> Iterator[None]:
    with process_as_it_was():
        yield
