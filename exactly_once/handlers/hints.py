"""Resolves the annotations of a handler's parameters to real classes, when the decorator runs.

An annotation may be a string (`from __future__ import annotations`, quotes). It may name a class that exists only in the function
around the handler, or only under `if TYPE_CHECKING:`. Parameters with a default are ignored: we never fill them, so their
annotations need not resolve. Never decides what a parameter is for. Called by the handler's plan.
"""

import ast
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any, get_type_hints

from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import escaped

__all__ = ["Hints", "innermost", "signature"]


def innermost(function: Callable[..., object]) -> FunctionType | None:
    """Return the plain function inside partials, bound methods, callable objects and `functools.wraps`, or None."""
    at: Any = function
    for _ in range(100):  # a cycle of __wrapped__ must not hang the import
        if isinstance(at, partial):
            at = at.func
        elif isinstance(at, MethodType):
            at = at.__func__
        elif hasattr(at, "__wrapped__"):
            at = at.__wrapped__
        elif isinstance(at, FunctionType):
            return at
        else:
            at = getattr(type(at), "__call__", None)  # noqa: B004
    return None


def signature(function: Callable[..., object]) -> inspect.Signature:
    """Return the parameters that a caller sees, without evaluating annotations that only a type checker can.

    Raises:
        ConfigurationError: The function has no signature (a built-in).
    """
    try:
        if sys.version_info >= (3, 14):  # annotations are evaluated late there, and names of TYPE_CHECKING would raise
            from annotationlib import Format

            return inspect.signature(function, annotation_format=Format.FORWARDREF)
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"its parameters cannot be read ({error}); write a function around it") from error


class Hints:
    """Resolves the annotations of one function.

    Args:
        function: The handler as it was decorated.
        caller_locals: The local names at the place of the decorator: models defined in a function.
        caller_globals: The global names there.
    """

    def __init__(
        self, function: Callable[..., object], caller_locals: Mapping[str, Any], caller_globals: Mapping[str, Any]
    ) -> None:
        plain = innermost(function)
        self._globals: dict[str, Any] = plain.__globals__ if plain is not None else dict(caller_globals)
        # the annotations of a function from another module use the names of that module
        self._locals: dict[str, Any] = dict(caller_locals) if self._globals is caller_globals or plain is None else {}
        if plain is not None:
            self._locals |= _enclosed(plain)
        self._hidden = _Hidden(plain.__code__ if plain is not None else None, self._globals)

    def resolve(self, annotation: object) -> Any:
        """Return the class or type that an annotation names.

        Raises:
            ConfigurationError: A name in it cannot be found; the text says which, and what to do.
        """
        missing: set[str] = set()
        while True:
            try:
                return self._evaluated(annotation)
            except NameError as error:
                name = error.name or ""
                if name in missing or name not in self._hidden:
                    raise ConfigurationError(
                        f"the name {name!r} in the annotation '{escaped(str(annotation), 120)}' is not known here. "
                        "Import it above the handler, or define it at the top of the module"
                    ) from error
                missing.add(name)
                self._locals[name] = self._hidden.value(name)
            except AttributeError as error:
                # `import shop` runs, but `import shop.models` is under TYPE_CHECKING: importing it completes `shop`
                if "" in missing:
                    raise _unreadable(annotation, error) from error
                missing.add("")
                self._locals |= self._hidden.modules()
            except (TypeError, SyntaxError) as error:
                raise _unreadable(annotation, error) from error

    def known(self, annotation: object) -> Any:
        """Return what an annotation names, or None if that is not known. Imports nothing.

        Used for return annotations: an import that only a type checker needs may run a module twice, and this check is optional.
        """
        try:
            return self._evaluated(annotation)
        except Exception:  # an annotation is the user's own code
            return None

    def _evaluated(self, annotation: object) -> Any:
        holder = SimpleNamespace(__annotations__={"it": annotation})
        return get_type_hints(holder, self._globals, self._locals, include_extras=True)["it"]

    def names(self) -> Mapping[str, Any]:
        """Return every name that a forward reference inside a model defined here may use."""
        return {**self._globals, **self._locals}


def _unreadable(annotation: object, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"the annotation '{escaped(str(annotation), 120)}' cannot be read: {error}")


def _enclosed(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


class _Hidden:
    """The names that a module imports or defines for type checkers only. Evaluated when a handler's annotation uses them.

    Only the statements that bind the wanted name run, with the names of the module (and its package, for relative imports). The
    module itself is not changed.
    """

    def __init__(self, code: CodeType | None, module: dict[str, Any]) -> None:
        self._code = code
        self._module = module
        self._found: dict[str, list[ast.stmt]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._bindings()

    def value(self, name: str) -> Any:
        names = dict(self._module)
        for _ in range(20):  # a statement may need another hidden name first
            try:
                for statement in self._bindings()[name]:
                    _run(statement, names)
                return names[name]
            except NameError as error:
                wanted = error.name or ""
                if wanted in names or wanted == name or wanted not in self:
                    raise ConfigurationError(f"{name!r} is defined under TYPE_CHECKING only, and {error}") from error
                names[wanted] = self.value(wanted)
            except (ImportError, AttributeError) as error:
                raise ConfigurationError(
                    f"{name!r} is imported under TYPE_CHECKING only, and importing it now failed: {error}. "
                    "If the two modules import each other, move the handler or the model to a module of its own"
                ) from error
        raise ConfigurationError(f"{name!r} is defined under TYPE_CHECKING only, and needs too many other such names")

    def modules(self) -> dict[str, Any]:
        found = self._bindings()
        return {name: self.value(name) for name, bound in found.items() if isinstance(bound[0], ast.Import)}

    def _bindings(self) -> dict[str, list[ast.stmt]]:
        if self._found is None:
            self._found = {}
            for name, statement in _hidden_statements(self._code, self._module):
                self._found.setdefault(name, []).append(statement)
        return self._found


def _run(statement: ast.stmt, names: dict[str, Any]) -> None:
    tree = ast.Module(body=[statement], type_ignores=[])
    exec(compile(tree, "<if TYPE_CHECKING>", "exec"), names)  # noqa: S102  (a statement of the user's own module)


def _hidden_statements(code: CodeType | None, module: dict[str, Any]) -> Iterator[tuple[str, ast.stmt]]:
    if code is None:
        return
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename, module)))
    except (SyntaxError, ValueError):  # the source is not that of this code, so nothing is known
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            for statement in node.body if _means_checking(node.test) else ():
                yield from _bound(statement)
            if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
                for statement in node.orelse if _means_checking(node.test.operand) else ():
                    yield from _bound(statement)


def _means_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _bound(top: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    if isinstance(top, ast.ClassDef):
        yield top.name, top
        return
    for node in ast.walk(top):  # also inside `try:` and `if sys.version_info`
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield alias.asname or alias.name.partition(".")[0], ast.copy_location(ast.Import([alias]), node)
            case ast.ImportFrom(names=aliases):
                # one name at a time: another name of the statement may exist in stub files only
                for alias in aliases:
                    single = ast.ImportFrom(node.module, [alias], node.level)
                    yield alias.asname or alias.name, ast.copy_location(single, node)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name, node
            case _:
                pass
