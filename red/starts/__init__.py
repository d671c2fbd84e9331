"""Starts: how the projections begin. One file each; every module of this folder registers itself on import."""

import importlib
import pkgutil

from red.starts.base import Start, StartContext, StartMaps, get, names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Start", "StartContext", "StartMaps", "get", "names", "register"]
