"""Cases of one test over both tiers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def with_few_quick(cases: Mapping[str, Any], quick: Collection[str]) -> list[Any]:
    """The cases as parameters under their names; all but `quick` in the slow tier."""
    assert set(quick) <= set(cases)
    return [
        pytest.param(case, id=name, marks=[] if name in quick else [pytest.mark.slow]) for name, case in cases.items()
    ]
