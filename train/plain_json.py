"""JSON as the standard has it: a figure that is NaN or infinite is written as null, and read as None."""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard


def to_json(value: object, indent: int | None = 1) -> str:
    """Writes a value as JSON that every reader takes; NaN and infinite numbers become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def of_json(data: str | bytes) -> Any:
    """Reads JSON; the NaN and Infinity of files from earlier versions become None.

    Raises:
        ValueError: the data are no JSON, or no text.
    """
    return json.loads(data, parse_constant=lambda _: None)


def is_figure(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
