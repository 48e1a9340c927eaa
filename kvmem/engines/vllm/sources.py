"""Python source as it is written: what a package declares, without importing any of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable

import msgspec

__all__ = ["Sources", "Taken"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

DEPTH = 8  # imports and base classes that are followed


class Taken(msgspec.Struct, frozen=True):
    """What a function takes, without `self`: names, how many have no default, * or ** as well."""

    names: tuple[str, ...]
    required: int
    more: bool

    def __str__(self) -> str:
        return f"({', '.join((*self.names, *(['...'] if self.more else [])))})"


class _Module(msgspec.Struct, frozen=True):
    is_package: bool
    scope: dict[str, ast.AST]


class _Found(msgspec.Struct, frozen=True):
    module: str
    node: ast.AST


class Sources:
    """The modules of one package; each is read once.

    Args:
        root: the package's folder, on the disk or in a wheel.
    """

    def __init__(self, root: Traversable) -> None:
        self._root = root
        self._modules: dict[str, _Module] = {}
        self._calls: dict[str, set[str]] = {}

    def has(self, module: str, name: str) -> bool:
        """Whether `module` has `name`, or `Class.name`: its own, imported, inherited, or set on
        `self` in a method."""
        return self._find(module, name, DEPTH) is not None

    def parameters(self, module: str, name: str) -> Taken | None:
        """What the function `name` takes; None if there is no such function."""
        found = self._find(module, name, DEPTH)
        if found is None or not isinstance(found.node, Function):
            return None
        arguments = found.node.args
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        bound = int(named[:1] in (["self"], ["cls"]))
        required = len(named) - bound - len(arguments.defaults)
        return Taken(
            names=(*named[bound:], *(a.arg for a in arguments.kwonlyargs)),
            required=required + sum(d is None for d in arguments.kw_defaults),
            more=arguments.vararg is not None or arguments.kwarg is not None,
        )

    def abstract(self, module: str, name: str) -> list[str]:
        """The methods that the class `name` leaves to its subclasses."""
        found = self._find(module, name, DEPTH)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return []
        return [
            node.name
            for node in found.node.body
            if isinstance(node, Function)
            and any("abstractmethod" in ast.unparse(mark) for mark in node.decorator_list)
        ]

    def calls(self, package: str, method: str) -> bool:
        """Whether a module of `package`, or below it, calls a method of that name."""
        if package not in self._calls:
            folder = self._root.joinpath(*package.split(".")[1:])
            self._calls[package] = {
                name
                for text in _texts(folder)
                for name in re.findall(r"\.(\w+)\(", re.sub(r"#.*", "", text))
            }
        return method in self._calls[package]

    def _find(self, module: str, name: str, depth: int) -> _Found | None:
        head, _, rest = name.partition(".")
        node = self._module(module).scope.get(head)
        if node is None or depth == 0:
            return None
        if isinstance(node, ast.ImportFrom):
            source = self._source(module, node)
            if source.partition(".")[0] != module.partition(".")[0]:
                return None if rest else _Found(source, node)
            original = next(a.name for a in node.names if (a.asname or a.name) == head)
            return self._find(source, f"{original}.{rest}" if rest else original, depth - 1)
        if not rest:
            return _Found(module, node)
        return self._member(module, node, rest, depth) if isinstance(node, ast.ClassDef) else None

    def _member(self, module: str, owner: ast.ClassDef, name: str, depth: int) -> _Found | None:
        node = dict(_members(owner)).get(name)
        if node is not None:
            return _Found(module, node)
        inherited = (self._find(module, f"{ast.unparse(b)}.{name}", depth - 1) for b in owner.bases)
        return next((found for found in inherited if found is not None), None)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        up = node.level - self._module(module).is_package
        return ".".join((*parts[: len(parts) - up], *([node.module] if node.module else [])))

    def _module(self, module: str) -> _Module:
        if module not in self._modules:
            path = module.split(".")[1:]
            package = self._root.joinpath(*path, "__init__.py")
            files = [package]
            if path:  # the package itself has no file beside it
                files.append(self._root.joinpath(*path[:-1], f"{path[-1]}.py"))
            text = "".join(f.read_text(encoding="utf-8") for f in files if f.is_file())
            scope = dict(_declared(ast.parse(text).body))
            self._modules[module] = _Module(package.is_file(), scope)
        return self._modules[module]


def _declared(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Each name that the statements bind, and what binds it, in every branch of theirs."""
    for node in body:
        match node:
            case ast.If() | ast.Try():
                inner = [*node.body, *node.orelse]
                if isinstance(node, ast.Try):
                    inner += [s for handler in node.handlers for s in handler.body]
                yield from _declared(inner)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                yield from ((a.asname or a.name, node) for a in node.names)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((t.id, node) for t in targets if isinstance(t, ast.Name))


def _members(owner: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """What a class has: what its methods set on `self`, then what its body binds."""
    for method in owner.body:
        if isinstance(method, Function):
            for node in ast.walk(method):
                targets = node.targets if isinstance(node, ast.Assign) else ()
                for target in (node.target,) if isinstance(node, ast.AnnAssign) else targets:
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        yield target.attr, node
    yield from _declared(owner.body)


def _texts(folder: Traversable) -> Iterator[str]:
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from _texts(entry)
            elif entry.name.endswith(".py"):
                yield entry.read_text(encoding="utf-8")
