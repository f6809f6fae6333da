"""A launch described for sizes that are not known yet: the description itself runs on symbolic sizes, and what comes out of
it is translated into another system's expressions.

So a kernel's grid, scalars and output shapes are written once, in its `launch.py`, and a TensorRT plugin that evaluates them
when shapes are known cannot disagree with a direct launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from plugins.triton_launch import Launch

Describe = Callable[..., Launch]
"""(inputs, **attributes) → the launch for inputs of these shapes and dtypes."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """An input of a launch: its dtype, and its sizes as ints or as expressions of another system."""

    dtype: torch.dtype
    shape: tuple[Any, ...]


def describe_symbolically(describe: Describe, operands: Sequence[Operand], attributes: dict[str, int]) -> Launch:
    """The launch of `describe`, with sizes, grid and scalars in the terms of the operands' expressions.

    Expressions need `+`, `*` and `//` with each other and with ints on the right. Constants are always ints.

    Returns a launch whose `grid` and `scalars` hold ints and expressions, and whose `outputs` are `Operand`s.

    Raises:
        ValueError: the description depends on a size that is not known, or computes what cannot be expressed.
    """
    environment = ShapeEnv()
    expressions: dict[sympy.Symbol, Any] = {}

    def size(value: Any) -> Any:
        if isinstance(value, int):
            return value
        # Traced values differ from each other and from 0 and 1, so that no two sizes are taken for one.
        hint, source = 1009 + 2 * len(expressions), ConstantSource(f"size_{len(expressions)}")
        symbol = environment.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        expressions[symbol] = value
        return environment.create_symintnode(symbol, hint=hint, source=source)

    with FakeTensorMode(shape_env=environment):
        inputs = tuple(
            torch.empty([size(each) for each in operand.shape], dtype=operand.dtype, device="meta") for operand in operands
        )
        launch = describe(inputs, **attributes)
        outputs = [(output.dtype, tuple(output.shape)) for output in launch.outputs]
    if environment.guards:
        conditions = ", ".join(str(guard.expr) for guard in environment.guards)
        raise ValueError(f"kernel {launch.kernel.__name__}: its launch depends on sizes that vary: {conditions}")
    symbolic = [name for name, value in launch.constants.items() if isinstance(value, torch.SymInt)]
    if symbolic:
        raise ValueError(
            f"kernel {launch.kernel.__name__}: constant {', '.join(symbolic)} is a size that varies; expected a fixed one"
        )

    def translated(value: Any) -> Any:
        return _translate(value.node.expr, expressions) if isinstance(value, torch.SymInt) else int(value)

    return replace(
        launch,
        grid=tuple(translated(each) for each in launch.grid),
        scalars=tuple(translated(each) for each in launch.scalars),
        outputs=tuple(Operand(dtype=dtype, shape=tuple(translated(each) for each in shape)) for dtype, shape in outputs),
    )


def _translate(expression: sympy.Expr, expressions: dict[sympy.Symbol, Any]) -> Any:
    """A symbolic size in the terms of `expressions`; expressions come first, so that ints stand on the right."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return expressions[expression]
    # Constants last: an int may stand only to the right of an expression.
    terms = [_translate(each, expressions) for each in sorted(expression.args, key=lambda each: each.is_number)]
    if isinstance(expression, sympy.Add):
        return _fold(terms, lambda left, right: left + right)
    if isinstance(expression, sympy.Mul) and expression.is_integer:
        return _fold(terms, lambda left, right: left * right)
    if isinstance(expression, FloorDiv):
        dividend, divisor = (_translate(each, expressions) for each in expression.args)
        return dividend // divisor
    raise ValueError(f"size {expression}: expected sums, products and floor divisions of sizes")


def _fold(terms: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    result = terms[0]
    for term in terms[1:]:
        result = combine(result, term)
    return result
