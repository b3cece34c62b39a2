"""Whether the Hugging Face hub answers, asked once: its clients retry for half a minute."""

from __future__ import annotations

import functools
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

SECONDS = 5.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def go_offline_if_unreachable() -> bool:
    """Let the hub's clients read their cache alone when it does not answer; whether they do now."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in _PROXIES) or _answers(constants.ENDPOINT):
        return False
    constants.HF_HUB_OFFLINE = True
    try:
        import datasets
    except ImportError:  # it is no part of what a model alone needs
        return True
    datasets.config.HF_HUB_OFFLINE = True
    return True


@functools.cache
def _answers(endpoint: str) -> bool:
    # A name server that is silent holds a thread up longer than its caller wants to wait.
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        return pool.submit(_connects, endpoint).result(timeout=SECONDS)
    except TimeoutError:
        return False
    finally:
        pool.shutdown(wait=False)


def _connects(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
