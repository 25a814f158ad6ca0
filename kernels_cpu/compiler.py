"""From emitted IR to a function address: LLVM at -O3, object code cached on disk.

Objects are kept by kernel name in a folder named after a hash of the sources and the LLVM version, the ISA, and the CPU with
its features: code for another CPU is never loaded and an edited emitter never meets its old output. They are written to a
temporary name and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from llvmlite import ir

from pyinfer.kernels_cpu.isa import ISA
from pyinfer.kernels_cpu.simd import Emitter, i64, void
from pyinfer.paths import kernels_dir

N_ARGS = 5  # op, step, first task, last task, scratch
Body = Callable[[Emitter, Any, Any, Any, Any, Any], None]


def cache_folder(isa: ISA) -> Path:
    """Where object code for this ISA and these sources lives."""
    return kernels_dir() / f"{source_hash()}-{isa.name}"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash over every source file of this package and the compiler's version."""
    import llvmlite

    digest = hashlib.sha256(f"{llvmlite.__version__} {llvmlite.binding.llvm_version_info}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def define(module: ir.Module, name: str, isa: ISA, n_args: int, *, internal: bool) -> tuple[Emitter, Any]:
    """A new void function of `n_args` int64 in `module`, with an emitter at its entry."""
    fn = ir.Function(module, ir.FunctionType(void, [i64] * n_args), name)
    if internal:
        fn.linkage = "internal"
        fn.attributes.add("noinline")
    return Emitter(ir.IRBuilder(fn.append_basic_block("entry")), isa), fn


def emit_ir(symbol: str, isa: ISA, body: Body) -> str:
    """The unoptimized IR of one kernel, as text."""
    module = ir.Module(symbol)
    e, fn = define(module, symbol, isa, N_ARGS, internal=False)
    op, step, first, last, scratch = fn.args
    body(e, e.ptr(op), e.ptr(step), first, last, e.ptr(scratch))
    e.b.ret_void()
    return str(module)


class Compiler:
    """Compiles kernels for one ISA and keeps them loaded for the life of the process."""

    def __init__(self, isa: ISA) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.isa = isa
        self._llvm = llvm
        self._machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=isa.cpu, features=isa.features, opt=3, jit=True, codemodel="jitdefault"
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        self._addresses: dict[str, int] = {}
        self._lock = threading.Lock()
        self.on_compile: Callable[[str], None] | None = None  # told the name of each kernel that is not cached
        host = f"{isa.cpu}|{isa.features}|{isa.prefetch}"
        self._folder = cache_folder(isa) / hashlib.sha256(host.encode()).hexdigest()[:12]

    def kernel(self, name: str, body: Body) -> int:
        """The address of the kernel `name`, emitted by `body(e, op, step, first, last, scratch)` if it is not cached."""
        return self.code(name, lambda symbol: emit_ir(symbol, self.isa, body))

    def code(self, name: str, emit: Callable[[str], str]) -> int:
        """The address of the function `name`; `emit(symbol)` gives the IR that defines it, if it is not cached.

        `name` must say everything that the IR depends on besides this package's sources and the ISA.
        """
        with self._lock:
            address = self._addresses.get(name)
            if address is None:
                symbol = f"pyinfer_{name}"
                blob = self._load(name) or self._build(name, emit(symbol))
                self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(blob))
                self._engine.finalize_object()
                address = self._engine.get_function_address(symbol)
                assert address, symbol
                self._addresses[name] = address
            return address

    def _build(self, name: str, ir_text: str) -> bytes:
        llvm = self._llvm
        if self.on_compile is not None:
            self.on_compile(name)
        module = llvm.parse_assembly(ir_text)
        module.triple = self._machine.triple
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_unrolling = False  # emitters unroll where it pays
        builder = llvm.create_pass_builder(self._machine, options)
        builder.getModulePassManager().run(module, builder)
        blob: bytes = self._machine.emit_object(module)
        self._save(name, blob)
        return blob

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.o"

    def _load(self, name: str) -> bytes | None:
        try:
            blob = self._path(name).read_bytes()
        except OSError:
            return None
        digest, body = blob[:32], blob[32:]
        return body if hashlib.sha256(body).digest() == digest else None

    def _save(self, name: str, blob: bytes) -> None:
        """A cache that cannot be written (full disk, read-only home) only costs the next start its time."""
        partial: str | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                partial = file.name
                file.write(hashlib.sha256(blob).digest() + blob)
            os.replace(partial, self._path(name))
        except OSError:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)


@lru_cache(maxsize=8)
def compiler_for(isa: ISA) -> Compiler:
    return Compiler(isa)
