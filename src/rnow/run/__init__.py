"""A training run, and the function that makes one.

``rnow.run`` is a package (``rnow.run.loop``, ``rnow.run.build``, ...) and is also promised as a function
(``from rnow import run``). Python binds a subpackage to its parent's attribute when it is first imported, so a function of
that name would be there or not depending on import order. Making the module callable keeps both meanings at all times.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """``rnow.run(config, ...)`` is ``rnow.run.build.run(config, ...)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from rnow.run.build import run

        return run(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        from rnow.run.build import run

        return inspect.signature(run)


sys.modules[__name__].__class__ = _CallablePackage
