"""A small bridge from plain Python loops to machine code, so that no user needs a compiler.

A kernel is a Python function over numbers and flat arrays. It runs as it stands (tests do so), and `Kernel.compiled`
writes it as LLVM text, which llvmlite turns into machine code for the processor at hand. The first call costs some
ten milliseconds per kernel, in every process, with no cache on disk; numba needs seconds for the same.

The language: numbers `I8` (integers of 64 bit), `F4`, `F8` and arrays `I4s`, `I8s`, `F4s`, `F8s` as arguments, named
so in the signature. Assignments, `for … in range`, `while`, `if`, `break`, `continue`, arithmetic, comparisons,
`and`, `or`, `not`, `x if c else y`, the functions in `FUNCTIONS`, and calls of other kernels as statements or values.
Sixteen numbers at once, for sums that are to stay in registers over an inner loop: `lanes` reads them, `put` writes
them, `wide` repeats one; numbers mix with them. `e = registers()` makes e[0], e[1], … variables, and a loop over
`unrolled(n)` is written out n times, which makes such indices constants. `prefetch` is a hint.
Arrays must not overlap, nothing checks their bounds, and `//` rounds towards zero.
"""

import ast
import ctypes
import inspect
import struct
import textwrap
import threading
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from typing import Any, TypeAlias

# For Python and type checkers these are anything; the writer below goes by their names.
I8: TypeAlias = Any
F4: TypeAlias = Any
F8: TypeAlias = Any
I4s: TypeAlias = Any
I8s: TypeAlias = Any
F4s: TypeAlias = Any
F8s: TypeAlias = Any
TYPES = {"I8": "i8", "F4": "f4", "F8": "f8", "I4s": "i4*", "I8s": "i8*", "F4s": "f4*", "F8s": "f8*"}
WIDE = "f4x16"
LLVM = {"i4": "i32", "i8": "i64", "f4": "float", "f8": "double", "b": "i1", WIDE: "<16 x float>"}
CTYPES: dict[str, Any] = {"i8": ctypes.c_int64, "f4": ctypes.c_float, "f8": ctypes.c_double}
WIDTH = {"i4": 4, "i8": 8, "f4": 4, "f8": 8}
ARITHMETIC: dict[type, tuple[str, str]] = {
    ast.Add: ("add nsw", "fadd reassoc nsz contract"),
    ast.Sub: ("sub nsw", "fsub reassoc nsz contract"),
    ast.Mult: ("mul nsw", "fmul reassoc nsz contract"),
    ast.Div: ("", "fdiv nsz"),
    ast.FloorDiv: ("sdiv", ""),
    ast.LShift: ("shl", ""),
    ast.RShift: ("ashr", ""),
    ast.BitAnd: ("and", ""),
    ast.BitOr: ("or", ""),
}
COMPARE: dict[type, tuple[str, str]] = {
    ast.Lt: ("slt", "olt"),
    ast.LtE: ("sle", "ole"),
    ast.Gt: ("sgt", "ogt"),
    ast.GtE: ("sge", "oge"),
    ast.Eq: ("eq", "oeq"),
    ast.NotEq: ("ne", "une"),
}


def f4(x: Any) -> float:
    """`x` rounded to single precision."""
    return struct.unpack("f", struct.pack("f", x))[0]


def f8(x: Any) -> float:
    """`x` in double precision."""
    return float(x)


def i8(x: Any) -> int:
    """`x` cut off to an integer."""
    return int(x)


def bits(x: Any) -> int:
    """The bit pattern of `x` in single precision; for x ≥ 0 it orders like x."""
    return struct.unpack("i", struct.pack("f", x))[0]


def power_of_two(k: int) -> float:
    """2^k in double precision."""
    return 2.0**k


def wide(x: Any) -> Any:
    """Sixteen times `x` in single precision."""
    return x


def lanes(a: Any, i: Any) -> Any:
    """Sixteen numbers of `a` from i on."""
    return a[i : i + 16].copy()


def put(a: Any, i: Any, x: Any) -> None:
    """Write sixteen numbers to `a` from i on."""
    a[i : i + 16] = x


def prefetch(a: Any, i: Any) -> None:
    """Have `a` near i brought from memory while other work goes on; i may lie outside."""


def registers() -> dict[int, Any]:
    """Variables by number."""
    return {}


unrolled = range

FUNCTIONS = {"f4": f4, "f8": f8, "i8": i8, "bits": bits, "power_of_two": power_of_two, "min": min, "max": max}
FUNCTIONS |= {"wide": wide, "lanes": lanes, "put": put, "prefetch": prefetch}

Value = tuple[str, str]  # an LLVM value and its type in our notation


class Kernel:
    """A function of the language above: call it for Python's answer, `compiled(...)` for the fast one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = inspect.unwrap(function)
        self.name = function.__name__
        self._code: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> Any:
        return self.function(*values)

    @cached_property
    def source(self) -> ast.FunctionDef:
        """The function's text, parsed."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        return tree

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The type of every argument."""
        return {
            argument.arg: TYPES[ast.unparse(argument.annotation or ast.Name("?"))] for argument in self.source.args.args
        }

    @property
    def result(self) -> str | None:
        """The type of the result, None for none."""
        return TYPES.get(ast.unparse(self.source.returns or ast.Name("?")))

    @property
    def compiled(self) -> Callable[..., Any]:
        """Machine code; takes integers for array arguments: the addresses of their first elements."""
        if self._code is None:
            with _lock:  # threads that need a kernel at once compile it once
                if self._code is None:
                    self._code = _machine_code(self)
        return self._code


def kernel(function: Callable[..., Any]) -> Kernel:
    """Mark a function as a kernel."""
    return Kernel(function)


def constant(node: ast.expr) -> int:
    """The value of an expression without variables."""
    return int(eval(compile(ast.fix_missing_locations(ast.Expression(node)), "kernel", "eval"), {"__builtins__": {}}))


class _Constant(ast.NodeTransformer):
    """Puts a number in the place of a loop's variable."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.number) if node.id == self.name else node


class _Writer:
    """Writes one kernel as LLVM text, statement by statement; variables live on the stack until LLVM lifts them."""

    def __init__(self, source: Kernel) -> None:
        self.kernel = source
        self.entry: list[str] = []
        self.body: list[str] = []
        self.count = 0
        self.slots: dict[str, str] = {}
        self.loops: list[tuple[str, str]] = []
        self.used: dict[str, Kernel] = {}
        self.families: set[str] = set()
        self.ended = False

    # ---- text ----
    def fresh(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def emit(self, line: str) -> None:
        if not self.ended:
            self.body.append("  " + line)

    def value(self, line: str, kind: str) -> Value:
        name = "%" + self.fresh()
        self.emit(f"{name} = {line}")
        return name, kind

    def label(self, name: str) -> None:
        self.jump(name)
        self.ended = False
        self.body.append(f"{name}:")

    def jump(self, name: str) -> None:
        self.emit(f"br label %{name}")
        self.ended = True

    def branch(self, condition: str, yes: str, no: str) -> None:
        self.emit(f"br i1 {condition}, label %{yes}, label %{no}")
        self.ended = True

    # ---- values ----
    def convert(self, value: Value, kind: str) -> str:
        text, have = value
        if have == kind:
            return text
        if kind == WIDE:
            one = self.value(f"insertelement {LLVM[WIDE]} poison, float {self.convert(value, 'f4')}, i64 0", WIDE)[0]
            every = "<16 x i32> zeroinitializer"
            return self.value(f"shufflevector {LLVM[WIDE]} {one}, {LLVM[WIDE]} poison, {every}", WIDE)[0]
        if have == "literal":  # a Python float that takes the type of its surroundings
            number = f4(float(text)) if kind == "f4" else float(text)
            return "0x" + struct.pack(">d", number).hex().upper()
        table = {
            ("i4", "i8"): "sext",
            ("i8", "i4"): "trunc",
            ("i8", "f8"): "sitofp",
            ("i8", "f4"): "sitofp",
            ("f8", "i8"): "fptosi",
            ("f4", "i8"): "fptosi",
            ("f4", "f8"): "fpext",
            ("f8", "f4"): "fptrunc",
            ("b", "i8"): "zext",
        }
        return self.value(f"{table[have, kind]} {LLVM[have]} {text} to {LLVM[kind]}", kind)[0]

    def pair(self, a: Value, b: Value) -> tuple[str, str, str]:
        """Both values in the wider of the two types."""
        kinds = {a[1], b[1]}
        if WIDE in kinds:
            kind = WIDE
        elif "f8" in kinds or kinds == {"literal"} or kinds == {"literal", "i8"}:
            kind = "f8"
        elif "f4" in kinds:
            kind = "f4"
        else:
            kind = "i8" if kinds != {"b"} else "b"
        return self.convert(a, kind), self.convert(b, kind), kind

    def register(self, node: ast.expr) -> str | None:
        """The name of the variable that e[0], e[1], … stands for; None for an array."""
        if not isinstance(node, ast.Subscript) or ast.unparse(node.value) not in self.families:
            return None
        return f"{ast.unparse(node.value)}.{constant(node.slice)}"

    def address(self, node: ast.Subscript, *, inside: bool = True) -> tuple[str, str]:
        assert isinstance(node.value, ast.Name)
        kind = self.kernel.arguments[node.value.id][:-1]
        index = self.convert(self.read(node.slice), "i8")
        how = "getelementptr inbounds" if inside else "getelementptr"
        return self.value(f"{how} {LLVM[kind]}, ptr %{node.value.id}, i64 {index}", "p")[0], kind

    def read(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=bool(x)):
                return str(int(x)), "b"
            case ast.Constant(value=int(x)):
                return str(x), "i8"
            case ast.Constant(value=float(x)):
                return repr(x), "literal"
            case ast.Name(id=name):
                if name in self.slots:
                    kind = self.slots[name]
                    return self.value(f"load {LLVM[kind]}, ptr %{name}.slot", kind)
                if name in self.kernel.arguments:
                    return f"%{name}", self.kernel.arguments[name]
                return self.read(ast.Constant(self.kernel.function.__globals__[name]))
            case ast.Subscript() if register := self.register(node):
                return self.read(ast.Name(register))
            case ast.Subscript():
                where, kind = self.address(node)
                loaded = self.value(f"load {LLVM[kind]}, ptr {where}, align {WIDTH[kind]}", kind)
                return (self.convert(loaded, "i8"), "i8") if kind == "i4" else loaded
            case ast.BinOp():
                a, b, kind = self.pair(self.read(node.left), self.read(node.right))
                if isinstance(node.op, ast.Div) and kind == "i8":
                    a, b, kind = self.convert((a, "i8"), "f8"), self.convert((b, "i8"), "f8"), "f8"
                operation = ARITHMETIC.get(type(node.op), ("", ""))[kind[0] == "f"]
                if not operation:
                    raise SyntaxError(f"{self.kernel.name}: {ast.unparse(node)} is not part of the kernel language")
                return self.value(f"{operation} {LLVM[kind]} {a}, {b}", kind)
            case ast.UnaryOp(op=ast.USub()):
                return self.read(ast.BinOp(ast.Constant(0), ast.Sub(), node.operand))
            case ast.UnaryOp(op=ast.Not()):
                return self.value(f"xor i1 {self.read(node.operand)[0]}, true", "b")
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                a, b, kind = self.pair(self.read(left), self.read(right))
                which = COMPARE[type(op)][kind[0] == "f"]
                return self.value(f"{'fcmp' if kind[0] == 'f' else 'icmp'} {which} {LLVM[kind]} {a}, {b}", "b")
            case ast.BoolOp():
                return self.short_circuit(node)
            case ast.IfExp():
                condition = self.read(node.test)[0]
                a, b, kind = self.pair(self.read(node.body), self.read(node.orelse))
                return self.value(f"select i1 {condition}, {LLVM[kind]} {a}, {LLVM[kind]} {b}", kind)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(name, node.args)
        raise SyntaxError(f"{self.kernel.name}: {ast.unparse(node)} is not part of the kernel language")

    def short_circuit(self, node: ast.BoolOp) -> Value:
        slot = "%" + self.fresh("c")
        self.entry.append(f"  {slot} = alloca i1")
        end = self.fresh("end")
        for i, part in enumerate(node.values):
            value = self.read(part)[0]
            self.emit(f"store i1 {value}, ptr {slot}")
            if i + 1 < len(node.values):
                more = self.fresh("more")
                self.branch(value, *((more, end) if isinstance(node.op, ast.And) else (end, more)))
                self.ended = False
                self.body.append(f"{more}:")
        self.label(end)
        return self.value(f"load i1, ptr {slot}", "b")

    def call(self, name: str, arguments: list[ast.expr]) -> Value:
        other = self.kernel.function.__globals__.get(name)
        if isinstance(other, Kernel):
            self.used[name] = other
            passed = []
            for node, kind in zip(arguments, other.arguments.values(), strict=True):
                if kind.endswith("*"):
                    assert isinstance(node, ast.Name)
                    passed.append(f"ptr %{node.id}")
                else:
                    passed.append(f"{LLVM[kind]} {self.convert(self.read(node), kind)}")
            text = f"@{name}({', '.join(passed)})"
            if other.result is None:
                self.emit(f"call void {text}")
                return "", "void"
            return self.value(f"call {LLVM[other.result]} {text}", other.result)
        if name in ("lanes", "put", "prefetch"):
            where, kind = self.address(ast.Subscript(arguments[0], arguments[1]), inside=name != "prefetch")
            if name == "prefetch":
                self.emit(f"call void @llvm.prefetch.p0(ptr {where}, i32 0, i32 2, i32 1)")
                return "", "void"
            assert kind == "f4"
            if name == "lanes":
                return self.value(f"load {LLVM[WIDE]}, ptr {where}, align 4", WIDE)
            self.emit(f"store {LLVM[WIDE]} {self.convert(self.read(arguments[2]), WIDE)}, ptr {where}, align 4")
            return "", "void"
        values = [self.read(node) for node in arguments]
        if name == "wide":
            return self.convert(values[0], WIDE), WIDE
        if name in ("f4", "f8", "i8"):
            return self.convert(values[0], name), name
        if name == "bits":
            single = self.convert(values[0], "f4")
            return self.convert(self.value(f"bitcast float {single} to i32", "i4"), "i8"), "i8"
        if name == "power_of_two":
            biased = self.value(f"add nsw i64 {values[0][0]}, 1023", "i8")[0]
            shifted = self.value(f"shl i64 {biased}, 52", "i8")[0]
            return self.value(f"bitcast i64 {shifted} to double", "f8")
        if name in ("min", "max"):
            a, b, kind = self.pair(*values)
            compare = f"{'fcmp' if kind[0] == 'f' else 'icmp'} {COMPARE[ast.Lt][kind[0] == 'f']} {LLVM[kind]} {a}, {b}"
            less = self.value(compare, "b")[0]
            first, second = (a, b) if name == "min" else (b, a)
            return self.value(f"select i1 {less}, {LLVM[kind]} {first}, {LLVM[kind]} {second}", kind)
        raise SyntaxError(f"{self.kernel.name}: {name} is not a function of the kernel language")

    # ---- statements ----
    def store(self, name: str, value: Value) -> None:
        if name not in self.slots:
            kind = {"literal": "f8"}.get(value[1], value[1])
            self.slots[name] = kind
            self.entry.append(f"  %{name}.slot = alloca {LLVM[kind]}")
        kind = self.slots[name]
        self.emit(f"store {LLVM[kind]} {self.convert(value, kind)}, ptr %{name}.slot")

    def assign(self, target: ast.expr, value: Value) -> None:
        name = target.id if isinstance(target, ast.Name) else self.register(target)
        if name:
            self.store(name, value)
            return
        assert isinstance(target, ast.Subscript)
        where, kind = self.address(target)
        text = self.convert((self.convert(value, "i8"), "i8") if kind == "i4" else value, kind)
        self.emit(f"store {LLVM[kind]} {text}, ptr {where}, align {WIDTH[kind]}")

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="registers"))):
                self.families.add(name)
            case ast.For(target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="unrolled"), args=[times])):
                for i in range(constant(times)):
                    self.block([_Constant(name, i).visit(deepcopy(part)) for part in node.body])
            case ast.Assign(targets=[target], value=value):
                self.assign(target, self.read(value))
            case ast.AugAssign(target=target, op=op, value=value):
                assert isinstance(target, ast.Name | ast.Subscript)
                self.assign(target, self.read(ast.BinOp(target, op, value)))
            case ast.For(target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"), args=bounds)):
                self.count_loop(name, bounds, node.body)
            case ast.While(test=test, body=body):
                self.loop(lambda: self.read(test)[0], body, lambda: None)
            case ast.If(test=test, body=body, orelse=orelse):
                yes, no, end = self.fresh("then"), self.fresh("else"), self.fresh("fi")
                self.branch(self.read(test)[0], yes, no)
                for name, part in ((yes, body), (no, orelse)):
                    self.ended = False
                    self.body.append(f"{name}:")
                    self.block(part)
                    self.jump(end)
                self.ended = False
                self.body.append(f"{end}:")
            case ast.Break():
                self.jump(self.loops[-1][1])
            case ast.Continue():
                self.jump(self.loops[-1][0])
            case ast.Return(value=None):
                self.emit("ret void")
                self.ended = True
            case ast.Return(value=ast.expr() as value):
                assert self.kernel.result is not None
                self.emit(f"ret {LLVM[self.kernel.result]} {self.convert(self.read(value), self.kernel.result)}")
                self.ended = True
            case ast.Expr(value=ast.Constant(value=str())):
                pass
            case ast.Expr(value=ast.Call() as call):
                self.read(call)
            case _:
                raise SyntaxError(f"{self.kernel.name}: {ast.unparse(node)} is not part of the kernel language")

    def loop(self, test: Callable[[], str], body: list[ast.stmt], step: Callable[[], None]) -> None:
        head, inner, after, end = (self.fresh(name) for name in ("head", "body", "next", "done"))
        self.label(head)
        self.branch(test(), inner, end)
        self.loops.append((after, end))
        self.ended = False
        self.body.append(f"{inner}:")
        self.block(body)
        self.loops.pop()
        self.label(after)
        step()
        self.jump(head)
        self.ended = False
        self.body.append(f"{end}:")

    def count_loop(self, name: str, bounds: list[ast.expr], body: list[ast.stmt]) -> None:
        start, stop = (ast.Constant(0), bounds[0]) if len(bounds) == 1 else (bounds[0], bounds[1])
        by = ast.literal_eval(bounds[2]) if len(bounds) == 3 else 1
        last = self.convert(self.read(stop), "i8")
        self.store(name, self.read(start))
        variable, step = ast.Name(name), ast.Constant(by)

        def test() -> str:
            return self.value(f"icmp {'slt' if by > 0 else 'sgt'} i64 {self.read(variable)[0]}, {last}", "b")[0]

        self.loop(test, body, lambda: self.store(name, self.read(ast.BinOp(variable, ast.Add(), step))))

    def block(self, body: list[ast.stmt]) -> None:
        for node in body:
            self.statement(node)

    def text(self, *, visible: bool) -> str:
        for name, kind in self.kernel.arguments.items():  # a number may be assigned to, so it gets a slot
            if not kind.endswith("*"):
                self.slots[name] = kind
                self.entry.append(f"  %{name}.slot = alloca {LLVM[kind]}")
                self.entry.append(f"  store {LLVM[kind]} %{name}, ptr %{name}.slot")
        self.block(self.kernel.source.body)
        if self.kernel.result is None:
            self.emit("ret void")
        else:
            self.emit("unreachable")
        arguments = ", ".join(
            f"ptr noalias %{name}" if kind.endswith("*") else f"{LLVM[kind]} %{name}"
            for name, kind in self.kernel.arguments.items()
        )
        result = "void" if self.kernel.result is None else LLVM[self.kernel.result]
        attributes = "nounwind" if visible else "nounwind alwaysinline"
        linkage = "" if visible else "internal "
        lines = [f"define {linkage}{result} @{self.kernel.name}({arguments}) {attributes} {{", "entry:"]
        return "\n".join([*lines, *self.entry, *self.body, "}"])


def llvm_text(source: Kernel) -> str:
    """The kernel and those it calls as one LLVM module."""
    parts: list[str] = []
    done: set[str] = set()

    def add(one: Kernel, *, visible: bool) -> None:
        writer = _Writer(one)
        parts.append(writer.text(visible=visible))
        done.add(one.name)
        for name, other in writer.used.items():
            if name not in done:
                add(other, visible=False)

    add(source, visible=True)
    return "\n".join([*parts, "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"])


_lock = threading.Lock()
_engines: list[Any] = []  # machine code lives as long as its engine


def available() -> bool:
    """Whether llvmlite (0.44 or later) is there; without it the CPU takes the same torch path as any other device."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return False
    return hasattr(llvm, "create_pass_builder")


def _machine_code(source: Kernel) -> Callable[..., Any]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=1
    )
    module = llvm.parse_assembly(llvm_text(source))
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    # Vectors are what counts here; unrolling and the last levels of optimisation only double the compile time.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = True
    options.loop_interleaving = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    kinds: list[Any] = [ctypes.c_void_p if kind.endswith("*") else CTYPES[kind] for kind in source.arguments.values()]
    result = None if source.result is None else CTYPES[source.result]
    return ctypes.CFUNCTYPE(result, *kinds)(engine.get_function_address(source.name))
