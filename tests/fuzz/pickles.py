"""Pickles put together by hand: what the pickler of the standard library would not write.

An expression is the bytes that leave one object on the unpickler's stack.
"""

import io
import pickle
import pickletools
import struct
from types import SimpleNamespace
from typing import Any, ClassVar

from hypothesis import strategies as st

from .edits import INTERESTING, interesting

MARKER = "marker"
"""File in the working directory that a payload makes when it runs."""


def integer(value: int) -> bytes:
    """An integer of any size up to 255 bytes."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def real(value: float) -> bytes:
    """A float."""
    return b"G" + struct.pack(">d", value)


def text(value: str) -> bytes:
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def named(path: str) -> bytes:
    """Whatever a module has under a name."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def list_of(*items: bytes) -> bytes:
    """A list."""
    return b"](" + b"".join(items) + b"e"


def dict_of(*items: bytes) -> bytes:
    """A dictionary of keys and values in turn."""
    return b"}(" + b"".join(items) + b"u"


def call(path: str, *args: bytes) -> bytes:
    """What a function returns."""
    return named(path) + tuple_of(*args) + b"R"


def new(path: str, *args: bytes) -> bytes:
    """A new object of a class."""
    return named(path) + tuple_of(*args) + b"\x81"


def built(instance: bytes, state: bytes) -> bytes:
    """An object that is given its state."""
    return instance + state + b"b"


def storage(kind: str, key: str, size: int, *, legacy: bool = False) -> bytes:
    """A storage of the file, by its key."""
    facts = [text("storage"), named(kind), text(key), text("cpu"), integer(size)]
    return tuple_of(*facts, *[NONE] * legacy) + b"Q"


NONE, TRUE = b"N", b"\x88"
_CODE = """
    os.system posix.system nt.system os.mkdir os._exit sys.exit subprocess.Popen subprocess.call shutil.rmtree
    builtins.eval builtins.exec builtins.getattr builtins.__import__ builtins.open builtins.print builtins.type
    builtins.object builtins.map __builtin__.eval functools.partial operator.attrgetter importlib.import_module
    pathlib.Path pathlib.Path.touch pathlib.PurePath webbrowser.open code.interact types.CodeType timeit.timeit
    pickle.loads numpy.load numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct
    collections.deque collections.defaultdict datetime.date __main__.Anything
    torch.load torch.save torch.hub.load torch.jit.load torch.serialization.load torch.nn.Module
    torch.nn.modules.linear.Linear audiomae.checkpoints.load
"""
CODE = tuple(_CODE.split())
"""What must not be looked up."""
_ALLOWED_BY_OTHERS = """
    torch.distributed.tensor.DTensor torch.distributed.device_mesh.DeviceMesh
    torch.nested._internal.nested_tensor.NestedTensor torch.nested._internal.nested_tensor._rebuild_njt
"""
ALLOWED_BY_OTHERS = tuple(_ALLOWED_BY_OTHERS.split())
"""What packages of PyTorch, once they are loaded, let files name in the whole process."""
_KNOWN = """
    collections.OrderedDict collections.Counter builtins.set builtins.bytearray builtins.complex _codecs.encode
    argparse.Namespace pathlib.PosixPath pathlib._local.PosixPath
    torch.Tensor torch.Size torch.device torch.FloatTensor torch.FloatStorage torch.LongStorage torch.QInt8Storage
    torch.float32 torch.int64 torch.complex64 torch.bool torch.quint8 torch.float8_e4m3fn torch.per_tensor_affine
    torch.storage.TypedStorage torch.storage.UntypedStorage torch.nn.parameter.Parameter
    torch.serialization._get_layout torch._tensor._rebuild_from_type_v2
    torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3
    torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state torch._utils._rebuild_qtensor
    torch._utils._rebuild_sparse_tensor torch._utils._rebuild_nested_tensor torch._utils._rebuild_wrapper_subclass
    torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_device_tensor_from_cpu_tensor
"""
KNOWN = tuple(_KNOWN.split())
"""What PyTorch's restricted unpickler and the project let a file name."""


# Tuples are left alone in these two: as keys they make PyTorch's unpickler crash, or take for ever.
def nested(depth: int) -> bytes:
    """A list in a list in a list ..."""
    return b"]" * depth + b"a" * (depth - 1)


def laughs(levels: int) -> bytes:
    """A list that holds one list twice, which holds one list twice, ...: small here, endless when written out."""
    expression = b"]"
    for level in range(levels):
        place = struct.pack("<I", (1 << 16) + level)  # in the memo, beyond what a pickler has used
        expression = b"](" + expression + b"r" + place + b"j" + place + b"e"
    return expression


def payload(path: str) -> bytes:
    """A call that makes the marker."""
    arguments = {
        "system": [text(f"touch {MARKER}")],
        "eval": [text(f"open({MARKER!r}, 'w')")],
        "exec": [text(f"open({MARKER!r}, 'w')")],
        "open": [text(MARKER), text("w")],
        "mkdir": [text(MARKER)],
        "Popen": [list_of(text("touch"), text(MARKER))],
        "call": [list_of(text("touch"), text(MARKER))],
        "touch": [text(MARKER)],
        "save": [integer(0), text(MARKER)],
    }
    return call(path, *arguments.get(path.rpartition(".")[2], [text(MARKER)]))


_sizes = st.one_of(st.integers(0, 4), st.integers(0, 70), interesting)
_shapes = st.lists(_sizes, max_size=4).map(lambda sizes: tuple_of(*map(integer, sizes)))
_dtypes = st.sampled_from([path for path in KNOWN if path.startswith("torch.") and path.count(".") == 1])
_storage_kinds = ("torch.FloatStorage", "torch.ByteStorage", "torch.QInt8Storage", "torch.storage.UntypedStorage")
_storages = st.builds(
    storage,
    st.sampled_from(_storage_kinds),
    st.sampled_from(["0", "1", "2", "999", "../data.pkl", ""]),
    st.one_of(st.sampled_from([1, 16, 64]), interesting),
    legacy=st.booleans(),
)
_order = new("collections.OrderedDict")
_tensors = st.one_of(
    st.builds(
        lambda *args: call("torch._utils._rebuild_tensor_v2", *args, NONE, _order),
        _storages,
        _sizes.map(integer),
        _shapes,
        _shapes,
    ),
    st.builds(
        lambda *args: call("torch._utils._rebuild_tensor", *args), _storages, _sizes.map(integer), _shapes, _shapes
    ),
    st.builds(
        lambda shape, dtype: call("torch._utils._rebuild_meta_tensor_no_storage", named(dtype), shape, shape, NONE),
        _shapes,
        _dtypes,
    ),
    st.builds(lambda *sizes: call("torch.Tensor", *sizes), _sizes.map(integer)),
)
plain = st.one_of(
    st.sampled_from([*map(integer, INTERESTING), *map(real, (0.5, float("nan"), float("inf"), 1e300)), NONE, TRUE]),
    st.sampled_from(
        [*map(text, ("", "local", "cpu", "x" * 1000, "\ud800", "a\nb", "encoder.norm.weight")), b"U\x02\xff\xfe"]
    ),
    st.sampled_from([b"]", b"}", b")", b"\x8f", nested(100), nested(30_000), laughs(40)]),
)
"""Objects that any file may hold."""
_leaves = st.one_of(
    plain, st.sampled_from([b"j\xff\xff\xff\x7f", b"h\0"]), st.sampled_from(KNOWN).map(named), _storages, _tensors
)
_codes = st.one_of(st.sampled_from(CODE).map(payload), st.sampled_from(CODE + ALLOWED_BY_OTHERS).map(named))


def _extend(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    some = st.lists(inner, max_size=3)
    name = st.sampled_from(KNOWN)
    return st.one_of(
        st.builds(lambda name, args: call(name, *args), name, some),
        st.builds(lambda name, args: new(name, *args), name, some),
        st.builds(built, inner, inner),
        st.builds(
            lambda name, state: built(new(name), dict_of(text("shape"), state, text("__class__"), state)), name, inner
        ),
        st.builds(
            lambda tensor, name, state: call(
                "torch._tensor._rebuild_from_type_v2",
                named(name),
                named("torch.Tensor"),
                tuple_of(tensor),
                dict_of(text("dim"), state),
            ),
            inner,
            name,
            inner,
        ),
        st.builds(
            lambda layout, a, b: call(
                "torch._utils._rebuild_sparse_tensor",
                call("torch.serialization._get_layout", text(layout)),
                tuple_of(a, b, tuple_of(integer(4))),
            ),
            st.sampled_from(["torch.sparse_coo", "torch.sparse_csr", "torch.strided"]),
            inner,
            inner,
        ),
        some.map(lambda items: tuple_of(*items)),
        some.map(lambda items: list_of(*items)),
        some.map(lambda items: dict_of(*(part for item in items for part in (item, item)))),
    )


expressions = st.one_of(plain, _leaves, _codes, st.recursive(st.one_of(_leaves, _codes), _extend, max_leaves=5))
"""Objects: plain, of PyTorch, and code."""

OPCODES = st.one_of(
    st.sampled_from(
        [bytes([code]) for code in b"(.0123RSbcdeloqrstu)]}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94Q"]
    ),
    st.sampled_from(
        [b"ios\nsystem\n", b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"Pmarker\n", b"\x80\x05", b"\x95" + b"\xff" * 8]
    ),
    st.sampled_from(
        [
            b"X\xff\xff\xff\x7f",
            b"\x8d" + b"\xff" * 8,
            b"\x8e" + b"\xff" * 8,
            b"I1" + b"0" * 5000 + b"\n",
            b"\x8b\xff\xff\xff\x7f",
        ]
    ),
    expressions,
)
"""Single instructions, which leave the stack in any state, and whole expressions."""


class Planted:
    """Stands in an object for an expression."""

    def __init__(self, expression: bytes):
        self.expression = expression


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes planted expressions as they are."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_planted(self, planted: Planted) -> None:
        self.write(planted.expression)

    dispatch[Planted] = save_planted


# What torch.save takes as pickle_module.
PICKLE = SimpleNamespace(
    __name__="pickle", Pickler=_Pickler, dump=lambda content, file, protocol: _Pickler(file, protocol).dump(content)
)


def instructions(data: bytes) -> list[bytes]:
    """The instructions of a pickle, one by one; what comes after it is left out."""
    starts = [start for _, _, start in pickletools.genops(io.BytesIO(data)) if start is not None]
    end = starts[-1] + 1
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], end], strict=True)]


_KINDS = {"number": (b"J", b"K", b"M", b"\x8a"), "word": (b"X",), "name": (b"c",)}
_words = st.sampled_from(
    ["", "storage", "0", "1", "99", "cpu", "cuda:0", "meta", "x", "config", "model", "depth", "a\nb", "x" * 5000]
)
Change = tuple[Any, ...]
gentle_changes = st.one_of(
    st.tuples(st.just("number"), st.integers(0, 2**16), interesting.map(integer)),
    st.tuples(st.just("word"), st.integers(0, 2**16), _words.map(text)),
)
"""Other integers and strings in a pickle."""
changes = st.one_of(
    gentle_changes,
    st.tuples(st.just("name"), st.integers(0, 2**16), st.sampled_from(KNOWN + CODE).map(named)),
    st.tuples(st.just("drop"), st.integers(0, 2**16)),
    st.tuples(st.just("repeat"), st.integers(0, 2**16)),
    st.tuples(st.just("swap"), st.integers(0, 2**16), st.integers(0, 2**16)),
    st.tuples(st.just("insert"), st.integers(0, 2**16), OPCODES),
    st.tuples(st.just("replace"), st.integers(0, 2**16), OPCODES),
)
"""Changes of a pickle's instructions."""


def changed(data: bytes, changes: tuple[Change, ...]) -> bytes:
    """Change a pickle, instruction by instruction; what comes after it stays."""
    if not changes:
        return data
    parts = instructions(data)
    rest = data[sum(map(len, parts)) :]
    for name, number, *more in changes:
        at = number % len(parts)
        match name, more:
            case "number" | "word" | "name", [code]:
                like = [at for at, part in enumerate(parts) if part[:1] in _KINDS[name]]
                if like:
                    parts[like[number % len(like)]] = code
            case "drop", []:
                parts[at] = b""
            case "repeat", []:
                parts[at] *= 2
            case "swap", [other]:
                other %= len(parts)
                parts[at], parts[other] = parts[other], parts[at]
            case "insert", [code]:
                parts[at] = code + parts[at]
            case "replace", [code]:
                parts[at] = code
    return b"".join(parts) + rest
