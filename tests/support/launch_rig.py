"""The launch cache without a GPU: the ops' Python functions and csrc/launch_cache.cpp on CPU tensors, with launches noted.

Ops of a namespace of their own have the schemas and the kernels of gradkernels' at the CPU's key. Where Triton would launch,
`Rig.run` notes what Triton's launcher passes to the driver; what C++ launches is noted by the function it calls. Both are
`Seen`, and tests compare them.
"""

import ctypes
import itertools
import struct
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from benchmarks.codegen import Launch, compile_for, signature_of
from gradkernels.library import _C
from gradkernels.telemetry import NUM_SLOTS
from gradkernels.triton import KERNELS, launch
from gradkernels.triton import launch_cache as cache

NAMESPACE = "cache_test"
BYTES = {"i32": 4, "i64": 8, "fp32": 4}
FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
LIBRARIES = []
KEPT = []
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Seen:
    """A launch as the driver sees it; each parameter is (bytes, value), and `pointers` says which are addresses."""

    handle: int
    grid: tuple
    block: tuple
    shared: int
    stream: int | None
    parameters: tuple
    pointers: tuple


def stand_in(found, handle):
    """What Triton's compiler would return, as far as captured launches look at it."""
    types, _, _ = signature_of(found)
    sizes = [BYTES.get(kind, 8) for kind in types.values() if kind != "constexpr"] + [8, 8]
    lines = ",\n".join(f"\t.param .u{8 * size} k_param_{index}" for index, size in enumerate(sizes))
    metadata = SimpleNamespace(
        name="k",
        num_warps=found.options["num_warps"],
        target=GPUTarget("cuda", 90, 32),
        shared=1000 + handle,
        num_ctas=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        global_scratch_size=0,
        profile_scratch_size=0,
    )
    text = f".visible .entry k(\n{lines}\n)\n.reqntid 128\n{{\n"
    return SimpleNamespace(src=SimpleNamespace(signature=types), metadata=metadata, asm={"ptx": text}, function=handle)


class Rig:
    """compiled_for(found, handle) compiles; `python` are launches by the Python path, `replayed` those by C++."""

    def __init__(self, compiled_for=stand_in):
        self.compiled_for, self.compiled = compiled_for, {}
        self.python, self.replayed, self.code = [], [], 0
        self.callback = FUNCTION(self._launched)

    def run(self, kernel, grid, args, constants, options):
        """In the place of launch.run."""
        found = Launch(kernel, args, constants, options)
        types, compile_time, attributes = signature_of(found)
        aligned = [t.data_ptr() % 16 for t in args if isinstance(t, torch.Tensor)]
        key = str((kernel.fn.__name__, types, compile_time, attributes, aligned, options))
        if key not in self.compiled:
            self.compiled[key] = self.compiled_for(found, len(self.compiled) + 1)
        compiled = self.compiled[key]
        given = dict(zip((p.name for p in kernel.params), args, strict=False)) | constants
        values, pointers = [], []
        for name, kind in types.items():
            if kind != "constexpr":
                pointers.append(kind.startswith("*"))
                value = given[name].data_ptr() if pointers[-1] else struct.unpack("<Q", struct.pack("<q", given[name]))[0]
                values.append((BYTES.get(kind, 8), value & (2 ** (8 * BYTES.get(kind, 8)) - 1)))
        parameters = (*values, (8, 0), (8, 0))
        block = (compiled.metadata.num_warps * compiled.metadata.target.warp_size, 1, 1)
        grid = (*grid, 1, 1)[:3]
        shared = compiled.metadata.shared
        self.python.append(Seen(compiled.function, grid, block, shared, None, parameters, (*pointers, False, False)))
        return compiled

    def _launched(self, handle, x, y, z, block_x, block_y, block_z, shared, stream, parameters, extra):
        kernel = next(compiled for compiled in self.compiled.values() if compiled.function == handle)
        kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        sizes = [*(BYTES.get(kind, 8) for kind in kinds), 8, 8]
        values = [int.from_bytes(ctypes.string_at(parameters[k], size), "little") for k, size in enumerate(sizes)]
        pointers = (*(kind.startswith("*") for kind in kinds), False, False)
        block = (block_x, block_y, block_z)
        passed = tuple(zip(sizes, values, strict=True))
        self.replayed.append(Seen(handle, (x, y, z), block, shared, stream, passed, pointers))
        return self.code

    def take(self):
        """(launches by Python, launches by C++) since the last time."""
        taken = self.python, self.replayed
        self.python, self.replayed = [], []
        return taken


@contextmanager
def rigged(compiled_for=stand_in, capture=cache.capture):
    """(rig, {op: its callable}) with fresh captured launches."""
    rig, namespace = Rig(compiled_for), f"{NAMESPACE}_{next(NUMBERS)}"
    library = torch.library.Library(namespace, "DEF")
    LIBRARIES.append(library)
    for op, kernel in KERNELS.items():
        library.define(str(getattr(torch.ops.gradkernels, op).default._schema).removeprefix("gradkernels::"))
        _C.implement(f"{namespace}::{op}", "CPU", kernel, capture)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "run", rig.run))
        stack.enter_context(mock.patch.object(cache, "can_launch", return_value=True))
        _C.set_launch_function(ctypes.cast(rig.callback, ctypes.c_void_p).value)
        ops = {op: getattr(getattr(torch.ops, namespace), op).default for op in KERNELS}
        yield rig, ops
        _C.set_launch_function(0)


def counts(op):
    """{"kinds", "captured launches", "replays"} of an op of a rig."""
    return _C.caches_of(op._schema.name)


def for_hopper(found, handle):
    """The kernel compiled for sm_90; the handle is not the driver's."""
    compiled = compile_for(found, GPUTarget("cuda", 90, 32))
    compiled.function = handle
    return compiled


def table(ports, on=True):
    return torch.zeros(ports, NUM_SLOTS, 8, dtype=torch.float64) if on else None


def rows(ports):
    return torch.full((ports, 8), torch.nan, dtype=torch.float64)


def outputs_of(result):
    return result if isinstance(result, (tuple, list)) else () if result is None else (result,)


def normalised(launches, args, outputs):
    """The launches with addresses as ("argument" or "output", which, bytes in) or ("temporary", which)."""
    owners = [("argument", k, t) for k, t in enumerate(args)] + [("output", k, t) for k, t in enumerate(outputs)]
    owners = [(kind, k, t) for kind, k, t in owners if isinstance(t, torch.Tensor) and t.numel()]
    temporaries = {}

    def name(address):
        for kind, k, t in owners:
            if t.data_ptr() <= address < t.data_ptr() + cache.extent(t):
                return kind, k, address - t.data_ptr()
        return ("temporary", temporaries.setdefault(address, len(temporaries))) if address else "null"

    return [
        (
            seen.handle,
            seen.grid,
            seen.block,
            seen.shared,
            seen.stream,
            [
                (size, name(value) if pointer else value)
                for (size, value), pointer in zip(seen.parameters, seen.pointers, strict=True)
            ],
        )
        for seen in launches
    ]


def form(result):
    """What a caller can see of the outputs but their values."""
    return [(t.shape, t.stride(), t.dtype, t.device, t.storage_offset(), t._is_view()) for t in outputs_of(result)]


def check_replay(rig, op, kernel, make_args):
    """The third call of a signature and all later ones launch from C++ what `kernel`, the Python function, launches."""
    for _ in range(3):  # the third is Python's too where it is the thread's first launch
        op(*make_args())
    rig.take()
    expected_args, args = make_args(), make_args()
    expected = kernel(*expected_args)
    python, _ = rig.take()
    before = counts(op)["replays"]
    got = op(*args)
    by_python, replayed = rig.take()
    assert not by_python
    assert counts(op)["replays"] == before + 1
    assert form(got) == form(expected)
    here = normalised(replayed, args, outputs_of(got))
    assert here == normalised(python, expected_args, outputs_of(expected))
    return here


class DLTensor(ctypes.Structure):
    """DLManagedTensor of the DLPack standard."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int),
        ("device_index", ctypes.c_int),
        ("num_dims", ctypes.c_int),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


def on_device_without_code(index):
    """Four float32 on device `index` of a kind (MAIA) that this PyTorch cannot do anything with; they are never read."""
    size, stride = (ctypes.c_int64 * 1)(4), (ctypes.c_int64 * 1)(1)
    managed = DLTensor(4096, 17, index, 1, 2, 32, 1, size, stride)
    KEPT.append((size, stride, managed))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return torch.utils.dlpack.from_dlpack(new(ctypes.addressof(managed), b"dltensor", None))
