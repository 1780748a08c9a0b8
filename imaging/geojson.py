"""GeoJSON of any size, feature by feature."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["features"]

CHUNK = 1 << 20
"""Characters read at a time."""
_BEGIN = re.compile(r'"features"\s*:\s*\[|^\s*\[')


def features(text: IO[str]) -> Iterator[Any]:
    """The features of a FeatureCollection, or of a bare list, one after another, without holding the file in memory.

    Raises:
        ValueError: it is neither, or it ends too early.
    """
    decoder, buffer = json.JSONDecoder(), ""
    while (start := _BEGIN.search(buffer)) is None:
        chunk = text.read(CHUNK)
        if not chunk:
            raise ValueError("no FeatureCollection")
        buffer += chunk
    position = start.end()
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if position < len(buffer) and buffer[position] == "]":
            return
        try:
            feature, position = decoder.raw_decode(buffer, position)
        except ValueError:
            chunk = text.read(CHUNK)
            if not chunk:
                raise ValueError("it ends in the middle") from None
            buffer, position = buffer[position:] + chunk, 0
            continue
        yield feature
