"""YAML files of configs, read as data: nothing that they contain is run."""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Mapping
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .trust import REMEDY, trusts_files

BASE = "_BASE_"
PYTHON = "tag:yaml.org,2002:python/"
# Detectron2's own RetinaNet configs compute their anchor sizes: !!python/object/apply:eval ["[x * 2 for x in [32, 64]]"].
EVAL = f"{PYTHON}object/apply:eval"
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}
LARGEST_EXPONENT = 64
MOST_ITEMS = 10_000


def read_yaml(path: str) -> dict[str, Any]:
    """Return the values of a config file and of those that it names in ``_BASE_``, whose values it overrides.

    Raises:
        UserError: a file is missing, is no mapping, has a key twice, asks for code to be run, or is based on itself.
        yaml.YAMLError: a file is not YAML.
    """
    return _read(path, ())


def _read(path: str, readers: tuple[str, ...]) -> dict[str, Any]:
    if path in readers:
        raise UserError(f"{path} is based on itself ({BASE}: {' -> '.join([*readers, path])}); remove one of these lines.")
    if not PathManager.isfile(path):
        where = f", which {readers[-1]} names in {BASE}," if readers else ""
        raise UserError(f"The config file {path}{where} does not exist; correct the path.")
    loader_class = _TrustingLoader if trusts_files() else _Loader
    with PathManager.open(path, "r") as file:
        loader = loader_class(file)
        loader.name = path
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} is {what}, not a mapping of config keys to values; correct it.")
    bases = values.pop(BASE, [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _override(merged, _read(_resolved(base, path), (*readers, path)), path)
    _override(merged, values, path)
    return merged


def _resolved(base: str, path: str) -> str:
    base = os.path.expanduser(base)
    is_whole = base.startswith("/") or "://" in base
    return base if is_whole else os.path.join(os.path.dirname(path), base)


def _override(values: dict[str, Any], others: Mapping[str, Any], path: str) -> None:
    for key, other in others.items():
        if isinstance(other, dict) and key in values:
            if not isinstance(values[key], dict):
                raise UserError(f"{path}: {key} has keys below it, but in the file that it is based on it is a value; rename it.")
            _override(values[key], other, path)
        else:
            values[key] = other


class _EachKeyOnce:
    """Refuses a mapping with a key twice, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise UserError(
                        f"{self.name} has the key {key.value} twice, in lines {lines[key.value]} and {line}, of which YAML "
                        "would drop the first; join them."
                    )
                lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Loader(_EachKeyOnce, yaml.SafeLoader):
    """Knows YAML's own types, Python's plain ones, and arithmetic."""


class _TrustingLoader(_EachKeyOnce, yaml.UnsafeLoader):
    """Builds whatever the file asks for."""


def _refused(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    raise UserError(
        f"{loader.name}, line {node.start_mark.line + 1}: the tag !!python/{suffix} asks for Python code to be run; write the "
        f"value itself (tuples as text: \"(1, 2)\") or, {REMEDY}."
    )


def _computed(loader: _Loader, node: yaml.Node) -> Any:
    arguments = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        _refused(loader, EVAL[len(PYTHON):], node)
    try:
        return _value(ast.parse(arguments[0].strip(), mode="eval").body, {})
    except (_NoArithmetic, SyntaxError, ArithmeticError, TypeError, ValueError):
        _refused(loader, EVAL[len(PYTHON):], node)


class _NoArithmetic(Exception):
    pass


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """Return the value of an expression of numbers, lists and comprehensions over lists."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, names) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, names)
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, names), _number(node.right, names)
        if isinstance(node.op, ast.Pow) and abs(right) <= LARGEST_EXPONENT and abs(left) <= MOST_ITEMS:
            return left**right
        if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.ListComp) and len(node.generators) == 1:
        (loop,) = node.generators
        items = _value(loop.iter, names)
        if isinstance(loop.target, ast.Name) and not loop.ifs and isinstance(items, (list, tuple)) and len(items) < MOST_ITEMS:
            return [_value(node.elt, {**names, loop.target.id: item}) for item in items]
    raise _NoArithmetic


def _number(node: ast.AST, names: Mapping[str, Any]) -> int | float:
    value = _value(node, names)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _NoArithmetic
    return value


_Loader.add_multi_constructor(PYTHON, _refused)
_Loader.add_constructor(f"{PYTHON}tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))
_Loader.add_constructor(EVAL, _computed)
for _name, _plain in {"str": "str", "unicode": "str", "int": "int", "float": "float", "bool": "bool", "none": "null"}.items():
    _Loader.add_constructor(f"{PYTHON}{_name}", yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{_plain}"])
for _name, _plain in {"list": "seq", "dict": "map"}.items():
    _Loader.add_constructor(f"{PYTHON}{_name}", yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{_plain}"])


def as_text(values: Mapping[str, Any]) -> str:
    """Return YAML of plain types only, in which yacs finds the same values: tuples are text or lists."""
    return yaml.safe_dump(_plain_types(values, is_top=True), sort_keys=False)


def _plain_types(value: Any, is_top: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_types(item, is_top=True) for key, item in value.items()}
    if isinstance(value, tuple) and is_top:
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [_plain_types(item) for item in value]
    return value
