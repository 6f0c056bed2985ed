"""Compiled functions on disk, for processes that compile at the same time.

Numba puts the versions of a function (for other types, another processor) into numbered files, with an index. Two
processes that compile different versions at once may take the same number; later ones then run one version in place of
the other, without a word. Here the name of a file is made from its version. What cannot be read or written, as on a
full disk, is compiled again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from typing import Any

from numba import njit
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc

from specsplit.errors import told

log = logging.getLogger(__name__)


class _Files(IndexDataCacheFile):
    def save(self, key: Any, data: Any) -> None:
        versions = self._load_index()
        version = sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        versions[key] = name = self._data_name(int(version[:16], 16))
        self._save_data(name, data)
        self._save_index(versions)

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # cut off, or by another version of Numba
            return {}


class _KernelCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn("read", told(error))
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn("kept", told(error))


def kernel(*, fastmath: Any = False) -> Callable[[Any], Any]:
    """As numba.njit(nogil=True, cache=True)."""

    def compiled(function: Any) -> Any:
        made = njit(nogil=True, fastmath=fastmath)(function)
        made._cache = _cache_of(function)
        return made

    return compiled


def callback(signature: Any, function: Any) -> Any:
    """As numba.cfunc(signature, cache=True)(function)."""
    made: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options={})
    made._cache = _cache_of(function)
    made.compile()
    return made


def _cache_of(function: Any) -> Any:
    try:
        return _KernelCache(function)
    except RuntimeError:
        _warn("kept", "there is no folder for them that can be written to")
        return NullCache()


@cache
def _warn(what: str, why: str) -> None:
    log.warning("compiled kernels cannot be %s (%s): set NUMBA_CACHE_DIR to a folder that can be", what, why)
