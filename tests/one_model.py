"""Whether a module that loads models one after the other lets each of them go before it loads the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def expect_one_at_a_time(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *loaders: str) -> list[str]:
    """From now on these functions of the module fail while another model of theirs is there.

    Returns:
        The folders that they load from, in turn.
    """
    there: list[weakref.ref[Any]] = []
    loaded: list[str] = []

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        def one(folder: Any, *arguments: Any) -> Any:
            assert not [each for each in there if each()], f"another model is in memory while {folder} is loaded"
            found = load(folder, *arguments)
            there.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
            loaded.append(str(folder))
            return found

        return one

    for name in loaders:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return loaded
