"""Which rows of the fault matrix run: the quick ones, or all of them."""

from __future__ import annotations

import pytest

_OPTION = "--slow-faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, action="store_true", help="also run the rows that take more than five seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Without the folder among the arguments this file is read too late to add its option.
    if config.getoption(_OPTION, default=False):
        return
    here = __file__.rpartition("/")[0]
    slow = [item for item in items if item.get_closest_marker("slow") and str(item.path).startswith(here)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
