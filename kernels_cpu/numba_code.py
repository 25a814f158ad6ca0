"""Numba functions compiled into the cache of kernels, so that a start that finds them there does not import Numba.

Importing Numba takes longer than many models take to open. What is kept is one object file a function, with all that it
calls; it must not use Numba's runtime: integers in, nothing out, no arrays that it makes, no exceptions.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from pyinfer.kernels_cpu.compiler import Compiler


def numba_function(
    compiler: Compiler, module: str, function: str, n_args: int, version: str = ""
) -> Callable[..., None]:
    """`module.function`, a Numba dispatcher of `n_args` int64, as a C function that lets other Python threads run.

    `version` stands for sources outside this package that the code comes from.
    """
    name = "_".join(part for part in ("numba", module.rpartition(".")[2], function, version) if part)
    address = compiler.code(name, lambda symbol: _emit(module, function, n_args, symbol))
    made: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * n_args)(address)
    return made


def _emit(module: str, function: str, n_args: int, symbol: str) -> str:
    """Numba's IR of the function with what it calls, and `symbol`, which calls it without Numba's frame of arguments."""
    import llvmlite.binding as llvm
    from numba import types

    dispatcher: Any = getattr(importlib.import_module(module), function)
    signature = (types.int64,) * n_args
    dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature]
    entry = compiled.fndesc.llvm_func_name
    code = llvm.parse_assembly(compiled.library.get_llvm_str())
    for value in (*code.functions, *code.global_variables):
        if not value.is_declaration:
            value.linkage = "internal"  # what the entry does not reach, such as the wrapper for Python, is dropped
    result, error = (str(argument.type) for argument in list(code.get_function(entry).arguments)[:2])
    parameters = ", ".join(f"i64 %a{i}" for i in range(n_args))
    return f"""{code}
define void @{symbol}({parameters}) {{
  %result = alloca {_pointee(result)}
  %error = alloca {_pointee(error)}
  %status = call i32 @{entry}({result} %result, {error} %error, {parameters})
  ret void
}}
"""


def _pointee(pointer: str) -> str:
    """Before LLVM 17 pointers may name what they point at; both of Numba's are to a pointer."""
    return pointer[:-1] if pointer.endswith("*") else "ptr"
