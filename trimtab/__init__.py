"""trimtab: an edge-deployment compiler for diffusion models.

import trimtab

trimtab.compile("./sdxl", "sdxl.bundle")              # needs the extra "compile"
pipe = trimtab.load("sdxl.bundle")                    # needs neither torch nor diffusers
pipe("a red circle", seed=0).images[0].save("circle.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "EngineCache",
    "Pipeline",
    "Recipe",
    "Result",
    "TrimtabError",
    "__version__",
    "compile",
    "load",
]

_WHERE = {
    "Denoiser": "trimtab.drop_in",
    "EngineCache": "trimtab.targets.cache",
    "Pipeline": "trimtab.runtime.load",
    "Recipe": "trimtab.recipe",
    "Result": "trimtab.runtime.load",
    "TrimtabError": "trimtab.errors",
    "compile": "trimtab.compiler",
    "load": "trimtab.runtime.load",
}

if TYPE_CHECKING:
    from trimtab.compiler import compile
    from trimtab.drop_in import Denoiser
    from trimtab.errors import TrimtabError
    from trimtab.recipe import Recipe
    from trimtab.runtime.load import Pipeline, Result, load
    from trimtab.targets.cache import EngineCache


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import trimtab`` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
