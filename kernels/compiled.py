"""How the CPU loops are compiled: the options of every `njit`, and two mends of what numba does with its cache.

- **Own copies.** Numba puts a copy of every function that a loop calls into the loop's own code, optimises it there,
  and leaves it to the process which of all copies of a name runs: the first one that was loaded. Copies round
  differently where sums may be reordered, so a process that compiles, where every function comes before its callers,
  would not agree with one that loads only the callers from the cache. Here the copies are private: a loop calls those
  in its own code.
- **Names by all sources.** Numba takes a loop from its cache if the loop's own file has not changed. Here the names of
  its files also tell the files that it imports, so that no change of a function leaves its callers as they were.
"""

import ast
import functools
import hashlib
import importlib.util
import sys
from pathlib import Path

from llvmlite.binding import Linkage
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.options import DefaultOptions

_SHARED = (Linkage.linkonce_any, Linkage.linkonce_odr, Linkage.weak_any, Linkage.weak_odr)


class _Library(JITCodeLibrary):
    def _finalize_final_module(self):
        # what callers link and optimise again, with copies under their common names: one of each in every caller
        self._shared_module = self._final_module.clone()
        for function in self._shared_module.functions:
            if not function.is_declaration and function.linkage == Linkage.external:
                function.linkage = Linkage.linkonce_odr
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage in _SHARED:
                function.linkage = Linkage.internal
        super()._finalize_final_module()


class _OwnCopies(Compiler):
    def define_pipelines(self):
        if self.state.library is None:  # as numba would make it
            self.state.library = _Library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
            self.state.library.enable_object_caching()
        return super().define_pipelines()


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == __name__.partition(".")[0] and name in sys.modules


@functools.cache
def _imports(name: str) -> set[str]:
    """The modules of this package that one of them imports when it is loaded."""
    module, found = sys.modules[name], set()
    for node in ast.parse(Path(str(module.__file__)).read_bytes()).body:
        if isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return set(filter(_is_ours, found))


@functools.cache
def _fingerprint(name: str) -> str:
    """Of a module's source and those of all that it imports."""
    seen, new = set(), {name}
    while new:
        seen |= new
        new = set().union(*map(_imports, new)) - seen
    digests = (hashlib.sha256(Path(str(sys.modules[x].__file__)).read_bytes()).digest() for x in sorted(seen))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]


def _with_imports(locator):
    """One of numba's places for caches, for this package's functions."""

    class Locator(locator):
        @classmethod
        def from_function(cls, function, file):
            found = super().from_function(function, file) if _is_ours(function.__module__) else None
            if found is not None:
                found.fingerprint = _fingerprint(function.__module__)
            return found

        def get_disambiguator(self):
            return f"{super().get_disambiguator()}-{self.fingerprint}"

    return Locator


_places = FunctionCache._impl_class._locator_classes
FunctionCache._impl_class._locator_classes = [*map(_with_imports, _places), *_places]


def _can_cache() -> bool:
    """Whether numba finds a folder to keep compiled code in; without one cache=True raises."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


# Sums may be reordered; infinities and NaN keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS = {"nogil": True, "error_model": "numpy", "cache": _can_cache(), "pipeline_class": _OwnCopies}
# For functions that allocate nothing: numba then does not count references to every view that they make of an array.
# The option is numba's own, so a version may come without it.
UNCOUNTED = {**OPTIONS, "_nrt": False} if hasattr(DefaultOptions, "_nrt") else OPTIONS
