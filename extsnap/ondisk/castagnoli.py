"""crc32c with the processor's instruction: the compiled part of the package of that name.

The package itself looks its own version up in the metadata of all packages, for which it loads a parser of mail,
among others: a twentieth of the time of `extsnap list`.  So it is passed by where its compiled part is found.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any


def _find() -> Callable[..., int]:
    package = PathFinder.find_spec("crc32c")
    places = package.submodule_search_locations if package else None
    compiled = PathFinder.find_spec("crc32c._crc32c", places) if places else None
    if compiled is not None and compiled.loader is not None:
        module: Any = module_from_spec(compiled)
        compiled.loader.exec_module(module)
        if hasattr(module, "crc32c"):
            return module.crc32c  # type: ignore[no-any-return]
    from crc32c import crc32c

    return crc32c


#: (data, value before: 0) -> the checksum of both.
crc32c = _find()
