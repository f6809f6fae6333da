"""What Triton's interpreter does otherwise than devices, put right for kernel tests (see `interpreter_runs.py`), and what it
does too often."""


def save_the_interpreters_time() -> None:
    """The interpreter replaces the language's functions at every launch, and again at every call of a function in a kernel, and
    makes a table of all dtypes to look up one. That takes more time than what kernels do; here it is done once a process."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()
    look_up, found = interpreter._get_np_dtype, {}

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to restore

    def look_up_once(dtype):
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = look_up(scalar)
        return found[scalar.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up_once
    _make_types_once()
    _make_constants_once()
    _let_numpy_broadcast()
    _make_handles_directly()
    _call_operators_directly()
    _leave_out_what_is_not_looked_at()
    _shift_bfloat16()


def _make_types_once() -> None:
    """Every value gets a type, with a shape of constants, and every two are made alike: most of the time of an operation."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    make_type, types, shapes = tl.block_type.__init__, {}, {}
    make_tensor, equal = tl.tensor.__init__, tl.dtype.__eq__
    broadcast = TritonSemantic.broadcast_impl_value

    def type_made_once(block, element_ty, shape):
        key = (id(element_ty), *shape)
        if key not in types:
            make_type(block, element_ty, shape)
            block.shape = shapes.setdefault((*block.shape,), block.shape)
            types[key] = vars(block)  # and with it `element_ty`, whose id stays its own
        block.__dict__ = types[key]

    def tensor_of_known_shape(tensor, handle, dtype):
        known = vars(dtype).get("known")
        if known is None:
            make_tensor(tensor, handle, dtype)
            known = dtype.known = {name: value for name, value in vars(tensor).items() if name != "handle"}
        vars(tensor).update(known, handle=handle)

    def broadcast_what_differs(semantic, left, right):
        one, other = left.type, right.type
        if one.is_block() == other.is_block() and (not one.is_block() or one.shape is other.shape):
            return left, right
        return broadcast(semantic, left, right)

    tl.block_type.__init__, tl.tensor.__init__ = type_made_once, tensor_of_known_shape
    tl.dtype.__eq__ = lambda dtype, other: dtype is other or equal(dtype, other)
    TritonSemantic.broadcast_impl_value = broadcast_what_differs


def _make_constants_once() -> None:
    """Every number becomes a constant where it stands, in an operation twice: as it is, then in the other operand's dtype."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    make, made = TritonSemantic.scalar_constant, {}
    promote, beside = TritonSemantic.binary_op_type_checking_impl, {}
    unwrap, plain = tl.core._unwrap_if_constexpr, (tl.tensor, bool, int, float)

    def made_once(semantic, value, dtype):
        key = dtype.name, type(value), repr(value)  # 0 and -0 are equal
        if key not in made:
            made[key] = make(semantic, value, dtype)
        return made[key]

    def constant(semantic, number, dtype):
        """None where the other operand gets another dtype."""
        key = dtype.name, type(number), repr(number)
        if key not in beside:
            other = tl.tensor(semantic.builder.get_null_value(dtype), dtype)
            promoted = (None, None) if dtype.is_ptr() else promote(semantic, other, number)
            beside[key] = promoted[1] if promoted[0] is other else None
        return beside[key]

    def promote_what_differs(semantic, left, right, *options, **named):
        one, other = left, right
        if len(options) < 4 and not named:  # options: no division
            if not isinstance(right, tl.tensor):
                other = constant(semantic, right, left.dtype) if isinstance(left, tl.tensor) else None
            elif not isinstance(left, tl.tensor):
                one = constant(semantic, left, right.dtype)
            if one is not None and other is not None and one.dtype is other.dtype and not one.dtype.is_ptr():
                return semantic.broadcast_impl_value(one, other)
        return promote(semantic, left, right, *options, **named)

    TritonSemantic.scalar_constant, TritonSemantic.binary_op_type_checking_impl = made_once, promote_what_differs
    tl.core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)


def _let_numpy_broadcast() -> None:
    """The interpreter fills each operand up to the shape of the result before NumPy, which does not need that, computes it."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import interpreter_builder

    promote, shapes = TritonSemantic.binary_op_type_checking_impl, {}

    def told(tensor, shape):
        """The tensor, said to be of that shape."""
        if tensor.type.is_block() and tensor.type.shape is shape:
            return tensor
        return tl.tensor(tensor.handle, tl.block_type(tensor.dtype, shape))

    class Unfilled(TritonSemantic):
        def broadcast_impl_value(self, left, right):
            one, other = left.type, right.type
            if one.is_block() and other.is_block():
                if one.shape is other.shape:
                    return left, right
                if len(one.shape) != len(other.shape):
                    return super().broadcast_impl_value(left, right)
                if (one.shape, other.shape) not in shapes:
                    shapes[one.shape, other.shape] = super().broadcast_impl_value(left, right)[0].type.shape
                shape = shapes[one.shape, other.shape]
            elif one.is_block() or other.is_block():
                shape = one.shape if one.is_block() else other.shape
            else:
                return left, right
            return told(left, shape), told(right, shape)

    unfilled = Unfilled(interpreter_builder)

    def promote_unfilled(semantic, left, right, *options, **named):
        # Named are the options of inline assembly, whose operands do not go to NumPy.
        return promote(semantic if named else unfilled, left, right, *options, **named)

    TritonSemantic.binary_op_type_checking_impl = promote_unfilled


def _make_handles_directly() -> None:
    """Of each result the interpreter looks twice whether its numbers fit into its type: once a size and type will do."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain, fitting = InterpreterBuilder.binary_op, set()

    def make_handle(handle, data, dtype, attr=None):
        handle.data, handle.dtype, handle.attr = data, dtype, {}
        size_and_type = data.itemsize, dtype.name
        if size_and_type not in fitting:
            handle.__post_init__()
            fitting.add(size_and_type)

    def binary_op(builder, left, right, operation):
        result, dtype = operation(left.data, right.data), left.dtype.scalar
        if (result.itemsize, dtype.name) not in fitting:
            return plain(builder, left, right, operation)
        return TensorHandle(result, dtype)

    TensorHandle.__init__, InterpreterBuilder.binary_op = make_handle, binary_op


def _call_operators_directly() -> None:
    """Not through two functions, of which each makes a dictionary of the arguments."""
    import inspect

    from triton.runtime import interpreter

    def attach(owner, name, member, builder, scope):
        function, own = inspect.unwrap(member), interpreter.interpreter_semantic

        def call(*arguments, _semantic=None, **named):
            return function(*arguments, **named, _semantic=own)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = attach


def _leave_out_what_is_not_looked_at() -> None:
    """The interpreter makes each integer sum and product again, in 64 bits, for an assertion that only a debugging one has."""
    from dataclasses import replace

    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def _shift_bfloat16() -> None:
    """The interpreter takes a number apart, and puts it together with more bits or with fewer."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast_impl(self, source, dst_type):
        kinds = (source.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle((source.data.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)
        return plain(self, source, dst_type)

    InterpreterBuilder.cast_impl = cast_impl


def let_dot_read_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw 16-bit words, and its matrix product takes those for numbers: converts them.

    Such a product is made in double precision: how a library orders the sums in single precision depends on the tile's size
    and on the CPU, and tests compare kernels of different tiles to the bit.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def numbers(handle: TensorHandle) -> np.ndarray:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *precision):
        if a.dtype.scalar != tl.bfloat16:  # and so has b
            return plain(self, a, b, d, *precision)
        product = np.matmul(numbers(a), numbers(b), dtype=np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def let_casts_round_to_bfloat16() -> None:
    """The interpreter cuts off the bits that bfloat16 does not have; devices round to the nearest."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, source, dst_type):
        if (source.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, dst_type)
        bits = source.data.view(np.uint32).astype(np.uint64)
        return TensorHandle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def let_casts_know_e4m3() -> None:
    """The interpreter rounds to FP8 without carrying into the exponent: converts as PyTorch does, both ways."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, source, dst_type, rounding_mode):
        kinds = (source.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.float8e4nv):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        if kinds in ((tl.float8e4nv, tl.float16), (tl.float8e4nv, tl.float32)):
            numbers = torch.from_numpy(np.ascontiguousarray(source.data)).view(torch.float8_e4m3fn).float().numpy()
            return TensorHandle(numbers.astype(np.float16 if kinds[1] == tl.float16 else np.float32), kinds[1])
        return plain(self, source, dst_type, rounding_mode)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def let_fma_round_once() -> None:
    """The interpreter rounds the product by itself; devices round the sum alone."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        wide = x.data.astype(np.longdouble) * y.data + z.data  # 64 bits hold a product of float32 numbers
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def let_empty_assembly_pass() -> None:
    """The interpreter has no inline assembly; of none at all, its operands are the results."""
    from types import SimpleNamespace

    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_inline_asm

    def create_inline_asm(self, assembly, constraints, values, *others):
        if assembly:
            return plain(self, assembly, constraints, values, *others)
        return SimpleNamespace(get_result=values.__getitem__)

    InterpreterBuilder.create_inline_asm = create_inline_asm


def let_assembly_scale_pairs() -> None:
    """The interpreter has no inline assembly: does what that of `plugins.moe.numbers_kernel` does."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    import triton.language as tl
    from assembly import RESULTS
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_inline_asm

    def create_inline_asm(self, assembly, constraints, values, *others):
        if assembly not in RESULTS:
            return plain(self, assembly, constraints, values, *others)
        words = [torch.from_numpy(np.ascontiguousarray(each.data).view(np.int32)) for each in values]
        results = [each.numpy().view(np.uint32) for each in RESULTS[assembly](*words)]
        return SimpleNamespace(get_result=lambda place: TensorHandle(results[place], tl.uint32))

    InterpreterBuilder.create_inline_asm = create_inline_asm
