"""The numbers on Triton's metrics port."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter

__all__ = ["read_metrics"]

_LINE = re.compile(r"^(\w+)(\{.*\})? (\S+)$", re.MULTILINE)


def read_metrics(url: str, label: str = "", seconds: float = 5.0) -> Counter[str]:
    """The value of each metric, summed over its labels; 0 for one that does not exist (yet).

    Args:
        url: :attr:`~staindiffuser.serving.server.TritonServer.metrics_url`.
        label: sum only what has this one (``model_version="3fa81b2c"``).
        seconds: to wait for the answer.

    Raises:
        OSError: nothing answers.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through http_proxy
    with opener.open(url, timeout=seconds) as response:
        text: str = response.read().decode()
    found: Counter[str] = Counter()
    for name, labels, value in _LINE.findall(text):
        if label in labels:
            found[name] += float(value)  # type: ignore[assignment]
    return found
