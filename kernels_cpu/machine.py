"""Machine primitives for @njit code: raw loads, atomics, pause, sleep and calls to kernels by address."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_i1, _i8, _i32, _i64 = (ir.IntType(n) for n in (1, 8, 32, 64))
_FUTEX_SYSCALL = {"x86_64": 202, "AMD64": 202, "aarch64": 98, "arm64": 98}


def _intrinsic(name: str, n_args: int, emit: Callable[[Any, Any], Any], result: Any = types.int64) -> Any:
    """A Numba intrinsic of int64 arguments. The generated source gives it the fixed arity that Numba asks for."""
    signature = result(*([types.int64] * n_args))

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        value = emit(builder, args)
        return context.get_dummy_value() if result is types.none else value

    parameters = ", ".join(f"a{i}" for i in range(n_args))
    scope: dict[str, Any] = {"signature": signature, "codegen": codegen}
    exec(f"def {name}(typingctx{', ' if n_args else ''}{parameters}):\n    return signature, codegen\n", scope)
    return intrinsic(scope[name])


def _word(b: Any, address: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(_i64))


def _libc(b: Any, name: str, result: Any, args: Any, *, variadic: bool = False) -> Any:
    kinds = [a.type for a in args]
    fn = b.module.globals.get(name)
    if fn is None:
        fn = ir.Function(b.module, ir.FunctionType(result, kinds[:1] if variadic else kinds, var_arg=variadic), name)
    return b.call(fn, args)


def _emit_call(b: Any, a: Any) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [_i64] * 5)
    b.call(b.inttoptr(a[0], ir.PointerType(kind)), a[1:])


def _emit_pause(b: Any, a: Any) -> Any:
    if platform.machine() in ("x86_64", "AMD64"):
        _libc(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
    else:
        b.fence("seq_cst")


def _emit_yield(b: Any, a: Any) -> Any:
    if sys.platform == "win32":
        _libc(b, "Sleep", ir.VoidType(), [_i32(0)])
    else:
        _libc(b, "sched_yield", _i32, [])


def _emit_wait(b: Any, a: Any) -> Any:
    """Sleep while the int32 at a[0] equals a[1]; elsewhere than on Linux, a nap after which the caller looks again."""
    if sys.platform == "linux" and platform.machine() in _FUTEX_SYSCALL:
        zero = _i64(0)
        number = _i64(_FUTEX_SYSCALL[platform.machine()])
        _libc(b, "syscall", _i64, [number, a[0], _i64(128), a[1], zero, zero, zero], variadic=True)
    elif sys.platform == "win32":
        _libc(b, "Sleep", ir.VoidType(), [_i32(1)])
    else:
        _libc(b, "usleep", _i32, [_i32(200)])


def _emit_wake(b: Any, a: Any) -> Any:
    """Wake the thread that waits on the int32 at a[0]."""
    if sys.platform == "linux" and platform.machine() in _FUTEX_SYSCALL:
        zero = _i64(0)
        number = _i64(_FUTEX_SYSCALL[platform.machine()])
        _libc(b, "syscall", _i64, [number, a[0], _i64(129), _i64(1 << 30), zero, zero, zero], variadic=True)


def _emit_clock(b: Any, a: Any) -> Any:
    """Nanoseconds of a POSIX clock; 0 on Windows, where nobody is ever found late."""
    if sys.platform == "win32":
        return _i64(0)
    pair = ir.ArrayType(_i64, 2)
    with b.goto_entry_block():
        slot = b.alloca(pair)
    _libc(b, "clock_gettime", _i32, [b.trunc(a[0], _i32), b.bitcast(slot, ir.PointerType(_i8))])
    seconds, nanoseconds = (b.load(b.gep(slot, [_i32(0), _i32(i)]), typ=_i64) for i in (0, 1))
    return b.add(b.mul(seconds, _i64(1_000_000_000)), nanoseconds)


# POSIX clock numbers: time passed, and time this thread was running
MONOTONIC, THREAD_TIME = (6, 16) if sys.platform == "darwin" else (1, 3)

# Sequentially consistent, so that a sleeper's count and its mailbox are never both seen as they were; free on x86.
load_word = _intrinsic("load_word", 1, lambda b, a: b.load(_word(b, a[0])))
atomic_add = _intrinsic("atomic_add", 2, lambda b, a: b.atomic_rmw("add", _word(b, a[0]), a[1], "seq_cst"))
atomic_load = _intrinsic("atomic_load", 1, lambda b, a: b.load_atomic(_word(b, a[0]), "seq_cst", 8))
atomic_store = _intrinsic(
    "atomic_store", 2, lambda b, a: b.store_atomic(a[1], _word(b, a[0]), "release", 8), types.none
)
call_kernel = _intrinsic("call_kernel", 6, _emit_call, types.none)
clock = _intrinsic("clock", 1, _emit_clock)
pause = _intrinsic("pause", 0, _emit_pause, types.none)
yield_core = _intrinsic("yield_core", 0, _emit_yield, types.none)
wait_on = _intrinsic("wait_on", 2, _emit_wait, types.none)
wake = _intrinsic("wake", 1, _emit_wake, types.none)
