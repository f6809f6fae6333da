"""Runs kernels written in Gluon on the CPU, which Triton's interpreter does not know: program by program, as Python.

A kernel's functions are called as they are written, with stand-ins for Gluon's operations on PyTorch tensors. The groups of
warps of a program are threads, which wait for each other at barriers as on the device. What runs beside the program happens as
late as the program allows, and what is not there yet is NaN:

- a copy to shared memory fills its target with NaN at once, and with the data when its group is waited for, or it arrives at a
  barrier;
- a matrix product that is not waited for reads its factors when it is, and there is no result before;
- new shared memory is NaN.

Loads and stores outside of a tensor are errors, and so is a wait that nobody ends.
"""

import threading
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType, SimpleNamespace

import torch
from assembly import RESULTS
from gluon_values import Pointer, Shared, Tile, fill_with_poison, tile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.runtime.jit import JITFunction

_PATIENCE = 60  # seconds until a wait counts as one that nobody ends
_THREADS_A_WARP = 32


class Product:
    """A matrix product that was not waited for."""

    def __init__(self, compute: Callable[[], Tile]) -> None:
        self.compute, self.result = compute, None


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = 0

    def arrive(self, count: int) -> None:
        assert count <= self.pending, "more arrivals than the barrier expects"
        self.pending -= count
        if not self.pending:
            self.phase, self.pending = self.phase ^ 1, self.count


class _Program:
    """One program's barriers, and what each of its threads has under way."""

    def __init__(self, program_id: tuple[int, ...], grid: tuple[int, ...], num_warps: int) -> None:
        self.program_id, self.grid = program_id, grid
        self.barriers, self.changed, self.errors = {}, threading.Condition(), []
        self.num_warps, self.under_way = num_warps, threading.local()

    def copies(self) -> list[list[tuple[Shared, Tile]]]:
        """In groups, the last one still open."""
        return self.under_way.__dict__.setdefault("copies", [[]])

    def products(self) -> list[Product]:
        return self.under_way.__dict__.setdefault("products", [])

    def arrive(self, barrier: Shared, count: int) -> None:
        with self.changed:
            self.barriers[barrier.tensor.data_ptr()].arrive(count)
            self.changed.notify_all()

    def wait(self, barrier: Shared, phase: object) -> None:
        with self.changed:
            state = self.barriers[barrier.tensor.data_ptr()]
            passed = self.changed.wait_for(lambda: self.errors or state.phase != int(phase), timeout=_PATIENCE)
        assert passed and not self.errors, "another group of warps failed" if self.errors else "nobody ends this wait"

    def deliver(self, num_groups: int) -> None:
        """The copies of the first groups."""
        for group in self.copies()[:num_groups]:
            for target, data in group:
                target.store(data)
            group.clear()

    def finish(self, num_outstanding: int) -> None:
        while len(self.products()) > num_outstanding:
            product = self.products().pop(0)
            product.result = product.compute()

    def run(self, groups: Iterable[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
        def guarded(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
            try:
                function(*arguments)
                assert not any(self.copies()) and not self.products(), "something is under way at the end"
            except BaseException as error:
                with self.changed:
                    self.errors.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=guarded, args=group) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


_program: _Program | None = None


class InterpretedKernel:
    """Launched as the kernel is: `kernel[grid](…)`."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.body = kernel, _interpreted(kernel, {})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int, num_stages: int, **constants: int) -> None:
            global _program
            given = [Pointer(each) if isinstance(each, torch.Tensor) else tile(each).int() for each in arguments]
            for x, y, z in torch.cartesian_prod(*(torch.arange(size) for size in (*grid, 1, 1)[:3])).tolist():
                _program = _Program((x, y, z), grid, num_warps)
                self.body(*given, **constants)

        return launch


def _interpreted(function: JITFunction, known: dict[JITFunction, FunctionType]) -> FunctionType:
    """The function, and all that it calls, with stand-ins."""
    if function not in known:
        names: dict[str, object] = {}
        known[function] = FunctionType(function.fn.__code__, names, function.fn.__name__, function.fn.__defaults__)
        for name, value in function.fn.__globals__.items():
            if isinstance(value, JITFunction):
                names[name] = _interpreted(value, known)
            elif isinstance(value, gl.constexpr):
                names[name] = value.value
            elif isinstance(value, ModuleType) and value in _MODULES:
                names[name] = _MODULES[value]
            else:
                names[name] = _FUNCTIONS.get(value, value) if callable(value) else value
    return known[function]


def _load(pointer: Pointer, mask: object = None, other: float = 0) -> Tile:
    places, mask = pointer.places(mask)
    values, other = pointer.tensor, torch.tensor(other, dtype=pointer.tensor.dtype)
    if values.dtype == torch.float8_e4m3fn:  # PyTorch moves their bytes
        return tile(torch.where(mask, values.view(torch.uint8)[places], other.view(torch.uint8)).view(values.dtype))
    return tile(torch.where(mask, values[places], other))


def _store(pointer: Pointer, value: Tile, mask: object = None) -> None:
    places, mask = pointer.places(mask)
    pointer.tensor[places[mask]] = value.expand(places.shape)[mask].to(pointer.tensor.dtype)


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
    room = Shared(torch.empty(shape, dtype=dtype))
    fill_with_poison(room.tensor)
    return room


def _copy(target: Shared, pointers: Pointer, mask: object = None) -> None:
    _program.copies()[-1].append((target, _load(pointers, mask)))
    fill_with_poison(target.tensor)


def _arrive_with_copies(barrier: Shared, increment_count: bool) -> None:
    assert not increment_count
    _program.deliver(len(_program.copies()))
    _program.arrive(barrier, _THREADS_A_WARP * _program.num_warps)


def _wait_group(num_outstanding: int) -> None:
    _program.deliver(max(0, len(_program.copies()) - 1 - num_outstanding))


def _init(barrier: Shared, count: int) -> None:
    _program.barriers[barrier.tensor.data_ptr()] = Barrier(count)


def _mma(
    a: Shared | Tile, b: Shared, accumulator: Tile | Product, *, use_acc: bool = True, is_async: bool = False
) -> Tile | Product:
    def compute() -> Tile:
        left = a.tensor if isinstance(a, Shared) else a
        product = tile((left.double() @ b.tensor.double()).float())  # as `triton_interpreter` has it
        before = accumulator.result if isinstance(accumulator, Product) else accumulator
        return before + product if use_acc else product

    if is_async:
        product = Product(compute)
        _program.products().append(product)
        return product
    _program.finish(0)
    return compute()


def _mma_wait(num_outstanding: int, deps: list[Tile | Product]) -> object:
    _program.finish(num_outstanding)
    results = tuple(each.result if isinstance(each, Product) else each for each in deps)
    assert all(each is not None for each in results), "a result is used whose product may still be computed"
    return results if len(results) > 1 else results[0]


def _assert(condition: bool) -> None:
    assert condition


def _assembled(text: str, arguments: list[Tile]) -> Tile | tuple[Tile, ...]:
    if not text:
        return arguments[0]
    words = [each.as_subclass(torch.Tensor).contiguous().view(torch.int32) for each in arguments]
    results = tuple(tile(each) for each in RESULTS[text](*words))
    return results if len(results) > 1 else results[0]


def _either(choose: Callable[[Tile, Tile], Tile]) -> Callable[[object, object], Tile]:
    return lambda a, b: choose(tile(a), tile(b))


_LAYOUTS = (
    "BlockedLayout",
    "SliceLayout",
    "DotOperandLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
)
_LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32", "int64", "uint8", "uint16")},
    **{name: lambda *_: None for name in _LAYOUTS},
    float8e4nv=torch.float8_e4m3fn,
    constexpr=gl.constexpr,
    static_range=range,
    static_assert=_assert,
    program_id=lambda axis: tile(_program.program_id[axis]).int(),
    num_programs=lambda axis: tile(_program.grid[axis]).int(),
    arange=lambda start, stop, layout: tile(torch.arange(start, stop, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout: tile(torch.full(shape, value, dtype=dtype)),
    load=_load,
    store=_store,
    where=lambda condition, a, b: torch.where(tile(condition), tile(a), tile(b)),
    minimum=_either(torch.minimum),
    maximum=_either(torch.maximum),
    max=lambda value, axis: value.amax(axis),
    sum=lambda value, axis: value.sum(axis, dtype=value.dtype),
    cdiv=lambda a, b: (tile(a) + b - 1) // b,
    exp=torch.exp,
    exp2=torch.exp2,
    log2=torch.log2,
    split=lambda value: value.unbind(-1),
    join=lambda a, b: torch.stack((a, b), dim=-1),
    convert_layout=lambda value, layout, assert_trivial=False: value,
    inline_asm_elementwise=lambda text, constraints, arguments, **_: _assembled(text, arguments),
    allocate_shared_memory=_allocate,
    warp_specialize=lambda groups, num_warps, registers: _program.run(groups),
)
_BARRIERS = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=_init,
    arrive=lambda barrier, count: _program.arrive(barrier, count),
    wait=lambda barrier, phase: _program.wait(barrier, phase),
)
_COPIES = SimpleNamespace(
    async_copy_global_to_shared=_copy,
    mbarrier_arrive=_arrive_with_copies,
    commit_group=lambda: _program.copies().append([]),
    wait_group=_wait_group,
)
_MODULES = {gl: _LANGUAGE, mbarrier: _BARRIERS, async_copy: _COPIES}
_FUNCTIONS = {fence_async_shared: lambda: None, warpgroup_mma: _mma, warpgroup_mma_wait: _mma_wait}
