"""Breaks a right Python program on its syntax tree, one place at a time. Runs nothing.

Only the text of the place is written anew: the rest stays as it is, also where the program continues a prompt.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

from fastdistill.core.step import Mutation

_OPPOSITES: Sequence[tuple[type[ast.cmpop], type[ast.cmpop]]] = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn),
    (ast.Is, ast.IsNot),
)
_COMPARED = {**dict(_OPPOSITES), **{other: one for one, other in _OPPOSITES}}
_CALCULATED: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


def mutate_python(code: str, setup: str = "") -> list[Mutation]:
    """Every mutation of a program that stands after `setup`; none where the two can't be parsed.

    Operators: comparison, arithmetic, connective, condition (negated), off_by_one (an index, the end of a range),
    constant, return (None), statement (left out).
    """
    before = setup + ("" if not setup or setup.endswith("\n") else "\n")
    source = (before + code).encode(errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    begins = list(accumulate(map(len, source.splitlines(keepends=True)), initial=0))
    first = len(before.encode(errors="replace"))
    found = []
    for node, parent in _walk(tree):
        for operator, text in _edits(node, parent):
            start = begins[node.lineno - 1] + node.col_offset
            end = begins[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            if start >= first:
                found.append(Mutation(operator, partial(_applied, source, first, start, end, text)))
    return found


def _applied(source: bytes, first: int, start: int, end: int, text: str) -> str:
    return (source[first:start] + text.encode() + source[end:]).decode()


def _walk(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST | None]]:
    """Expressions and statements that stand in the text, each with its parent."""
    if isinstance(node, ast.expr | ast.stmt):
        yield node, parent
    # What stands in an f-string has no place of its own before Python 3.12; a pattern of `match` takes no calculation;
    # an annotation decides nothing.
    if not isinstance(node, ast.JoinedStr | ast.pattern):
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    yield from _walk(child, node)


def _edits(node: ast.expr | ast.stmt, parent: ast.AST | None) -> Iterator[tuple[str, str]]:
    """Operators, and the text in the node's place."""
    match node:
        case ast.Compare():
            for at, op in enumerate(node.ops):
                ops = [*node.ops[:at], _COMPARED[type(op)](), *node.ops[at + 1 :]]
                yield "comparison", _text(ast.Compare(node.left, ops, node.comparators))
        case ast.BinOp() if other := _CALCULATED.get(type(node.op)):
            yield "arithmetic", _text(ast.BinOp(node.left, other(), node.right))
        case ast.AugAssign() if other := _CALCULATED.get(type(node.op)):
            yield "arithmetic", ast.unparse(ast.AugAssign(node.target, other(), node.value))
        case ast.BoolOp():
            yield "connective", _text(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "condition" if isinstance(node.op, ast.Not) else "arithmetic", _text(node.operand)
        case ast.Constant(value=bool() as value):
            yield "constant", str(not value)
        case ast.Constant(value=int() | float() as number):
            if isinstance(parent, ast.Slice | ast.Subscript) or node in _places(parent):
                yield "off_by_one", f"({number} - 1)"
                yield "off_by_one", f"({number} + 1)"
            else:
                yield "constant", f"({number!r} + 1)"
        case ast.Constant(value=str() as text) if not isinstance(parent, ast.Expr):
            yield "constant", repr(text + "x")
        case ast.Return(value=ast.expr()):
            yield "return", "return None"
        case ast.Assign() | ast.Expr(value=ast.Call()):
            yield "statement", "pass"
    if isinstance(node, ast.expr):
        if isinstance(parent, ast.If | ast.While | ast.IfExp) and parent.test is node:
            yield "condition", _text(ast.UnaryOp(ast.Not(), node))
        if not isinstance(node, ast.Constant) and node in _places(parent):
            yield "off_by_one", f"({ast.unparse(node)} - 1)"
            yield "off_by_one", f"({ast.unparse(node)} + 1)"


def _places(parent: ast.AST | None) -> list[ast.expr]:
    """The parts of a slice or a call of `range` that are indexes."""
    match parent:
        case ast.Slice():
            return [each for each in (parent.lower, parent.upper) if each is not None]
        case ast.Call(func=ast.Name(id="range")):
            return parent.args
    return []


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"
