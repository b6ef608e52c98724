"""`_rust.pyi` says what the compiled module has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import sedac_hf
from sedac_hf import _rust

STUB = ast.parse((Path(sedac_hf.__path__[0]) / "_rust.pyi").read_text())


def public(names):
    return {name for name in names if not name.startswith("_")}


def test_stubs_name_exactly_what_the_module_has():
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
    constants = {
        node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(classes) | set(functions) | constants == public(vars(_rust))
    for name, node in functions.items():
        assert list(inspect.signature(getattr(_rust, name)).parameters) == [arg.arg for arg in node.args.args], name
    for name, node in classes.items():
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        compiled = vars(getattr(_rust, name))
        assert public(methods) == public(compiled), name
        assert ("__new__" in methods) == ("__new__" in compiled), name
        for method, stub in methods.items():
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in stub.decorator_list)
            assert is_property == inspect.isgetsetdescriptor(compiled[method]), f"{name}.{method}"
            if not is_property:
                expected = [arg.arg for arg in stub.args.args[1:]]
                target = getattr(_rust, name) if method == "__new__" else compiled[method]
                got = [p for p in inspect.signature(target).parameters if p != "self"]
                assert got == expected, f"{name}.{method}"


def test_a_pass_cannot_be_made_by_hand():
    assert "__new__" not in vars(_rust.ForwardPass)
