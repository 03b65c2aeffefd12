"""Weight files of the PyTorch world, read and written without PyTorch.

`.pt` and `.pth` (the zip container of PyTorch 1.6 and later) are unpickled by a reader that knows tensors, dicts and
plain numbers and refuses every other name in the file, so that a file can never run code. `.safetensors` may be one
file or a folder with an index of shards. Arrays are views of the mapped file: nothing is in memory until it is used.
"""

import collections
import contextlib
import io
import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
INDEX = "model.safetensors.index.json"
WRAPPERS = ("state_dict", "weights", "model")  # keys under which trainers put the weights themselves

# NumPy's type, PyTorch's storage, safetensors' name
_TYPES: tuple[tuple[np.dtype, str, str], ...] = (
    (np.dtype(np.float64), "DoubleStorage", "F64"),
    (np.dtype(np.float32), "FloatStorage", "F32"),
    (np.dtype(np.float16), "HalfStorage", "F16"),
    (np.dtype(ml_dtypes.bfloat16), "BFloat16Storage", "BF16"),
    (np.dtype(np.int64), "LongStorage", "I64"),
    (np.dtype(np.int32), "IntStorage", "I32"),
    (np.dtype(np.int16), "ShortStorage", "I16"),
    (np.dtype(np.int8), "CharStorage", "I8"),
    (np.dtype(np.uint8), "ByteStorage", "U8"),
    (np.dtype(np.bool_), "BoolStorage", "BOOL"),
)
_FROM_STORAGE = {storage: dtype for dtype, storage, _ in _TYPES}
_FROM_SAFETENSORS = {name: dtype for dtype, _, name in _TYPES}
_TO_STORAGE = {dtype: storage for dtype, storage, _ in _TYPES}
_TO_SAFETENSORS = {dtype: name for dtype, _, name in _TYPES}

_METADATA = "pe_jax"  # our key among the metadata of a safetensors file, and our entry in a .pt
_ALIGNMENT = 64  # bytes; where PyTorch starts each tensor in its zip


class RefusedPickle(ValueError):
    """A `.pt` file asks for something other than tensors; the message names it. Nothing of the file was run."""


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a `.pt`, `.pth` or `.safetensors` file, or of a folder of safetensors shards, by its name.

    A `state_dict`, `weights` or `model` entry of a `.pt` is opened and what lies beside it (epoch, optimizer) ignored;
    deeper dicts become dotted names. Types are those of the file. The arrays are read-only views of the mapped file,
    so reading costs no memory; copy what must outlive the file or be changed.

    Raises:
      RefusedPickle: (a ValueError) if a `.pt` names anything but tensors, plain dicts and numbers.
      ValueError: if the file is cut short, of another format, or holds something that is not a tensor.
      FileNotFoundError: if there is no such file.
    """
    path = pathlib.Path(path)
    if path.is_dir() or path.name.endswith(".index.json"):
        return _read_shards(path)
    if _is_torch(path):
        return _read_torch(path)
    return _read_safetensors(path)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` was given as `metadata`; {} for files that others wrote."""
    path = pathlib.Path(path)
    if path.is_dir() or path.name.endswith(".index.json"):
        index = _index(path)
        if index is None:
            return read_metadata(_only_file(path))
        text = json.loads(index.read_text()).get("metadata", {}).get(_METADATA)
    elif _is_torch(path):
        with _zip(path) as archive:
            entries = [name for name in archive.namelist() if name.endswith(f"/{_METADATA}.json")]
            text = archive.read(entries[0]).decode() if entries else None
    else:
        with _safetensors(path) as file:
            text = (file.metadata() or {}).get(_METADATA)
    return json.loads(text) if text else {}


def write(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Writes tensors as the suffix of `path` says: `.safetensors`, or `.pt`/`.pth` for `torch.load(weights_only=True)`.

    The file appears whole or not at all: it is written beside its place and then moved there. One tensor at a time
    is brought to the host.

    Args:
      path: where to; missing folders are made.
      tensors: name → array (NumPy or JAX) of any of the types above.
      metadata: JSON types, for `read_metadata`; PyTorch and other readers ignore it.

    Raises:
      ValueError: for another suffix, or a type that the format lacks.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the suffix {path.suffix!r} must be one of {', '.join(SUFFIXES)}.")
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _TO_STORAGE:
            raise ValueError(f"{name} is {tensor.dtype}; want one of {', '.join(map(str, _TO_STORAGE))}.")
    text = json.dumps(dict(metadata), sort_keys=True) if metadata else None
    with _replacing(path) as file:
        (_write_torch if path.suffix in TORCH_SUFFIXES else _write_safetensors)(file, tensors, text)


# ---------------------------------------------------------------------------------------------------------- reading


def _is_torch(path: pathlib.Path) -> bool:
    """Whether the file is PyTorch's zip (else safetensors), judged by its first bytes and not by its name."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        return True
    if head[8:9] == b"{":
        return False
    if head[:1] == b"\x80":
        raise ValueError(
            f"{path} is a bare pickle, the format of PyTorch before 1.6, which cannot be read safely. Re-save it where "
            f'PyTorch is: torch.save(torch.load("{path.name}", weights_only=True), "new.pt").'
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` or download the file itself."
        )
    if path.suffix == ".safetensors":
        return False
    what = "is empty" if not head else f"begins with {head[:8]!r}"
    raise ValueError(f"{path} {what}: neither PyTorch's zip (.pt, .pth) nor safetensors. Download it again.")


def _map(path: pathlib.Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _index(path: pathlib.Path) -> pathlib.Path | None:
    found = path / INDEX if path.is_dir() else path
    return found if found.exists() else None


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files) or "none"
    raise ValueError(f"{folder} has no {INDEX}, and its weight files are: {names}. Name one file.")


def _read_shards(path: pathlib.Path) -> dict[str, np.ndarray]:
    index = _index(path)
    if index is None:
        return read(_only_file(path))
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        if pathlib.Path(file).name != file:
            raise ValueError(f"{index} points at {file!r}; want the name of a file beside it.")
        if not (index.parent / file).exists():
            raise FileNotFoundError(f"{index.parent / file} is missing; {index.name} asks for it.")
        tensors |= _read_safetensors(index.parent / file)
    if wrong := sorted(set(places) ^ set(tensors)):
        raise ValueError(f"{index} and its files disagree about {len(wrong)} tensors: {', '.join(wrong[:10])}.")
    return tensors


@contextlib.contextmanager
def _safetensors(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or is not safetensors ({error}). Download it again.") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    with _safetensors(path):  # the library checks the header against the file's length
        pass
    mapped = _map(path)
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _FROM_SAFETENSORS:
            raise ValueError(f"{path}: {name} is {entry['dtype']}; want one of {', '.join(_FROM_SAFETENSORS)}.")
        begin, end = entry["data_offsets"]
        data = mapped[start + begin : start + end]
        tensors[name] = data.view(_FROM_SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class _Storage(NamedTuple):
    """A run of numbers in the zip; named tuples, because a pickle can change nothing in them."""

    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, strings, numbers and `_Tensor`s; every other name in the pickle is refused.

    The callables it hands out are made anew for each file and return named tuples; none reaches Python's builtins.
    """

    def __init__(self, data: bytes, path: pathlib.Path):
        super().__init__(io.BytesIO(data), encoding="utf-8")

        def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
            return _Tensor(storage, offset, size, stride)

        def parameter(data: Any, *_: Any) -> Any:
            return data

        self._path = path
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): parameter,
            **{("torch", storage): storage for storage in _FROM_STORAGE},
        }

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedPickle(
                f"{self._path} names {module}.{name}, and only tensors and plain dicts of them are read; nothing was "
                "run. If you trust the file, save its state_dict alone where PyTorch is, and read that."
            ) from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(key), _, int(numel)) if dtype in _FROM_STORAGE:
                return _Storage(dtype, key, numel)
        raise RefusedPickle(f"{self._path} refers to {str(pid)[:80]}, which is no storage of a known type.")


@contextlib.contextmanager
def _zip(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Download it again.") from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    with _zip(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip, but not one of PyTorch's: it has {len(pickles)} data.pkl, not one.")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; re-save it on a little-endian one.")
        try:
            tree = _Unpickler(archive.read(pickles[0]), path).load()
        except (RefusedPickle, zipfile.BadZipFile):
            raise
        except Exception as error:  # a damaged pickle can fail in any way
            raise ValueError(f"{path} holds a damaged pickle ({type(error).__name__}: {error}).") from error
        mapped, storages = _map(path), {}

        def array(name: str, tensor: _Tensor) -> np.ndarray:
            try:
                storage = tensor.storage
                if storage not in storages:
                    data = _entry(archive, mapped, entries[f"{root}data/{storage.key}"])
                    storages[storage] = data[: storage.numel * _FROM_STORAGE[storage.dtype].itemsize]
                return _view(storages[storage], tensor)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{path} is cut short or damaged at {name} ({error}). Download it again.") from error

        return _named(tree, path, array)


def _entry(archive: zipfile.ZipFile, mapped: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a zip entry: a view of the mapped file where they are stored as they are, as PyTorch does."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return np.frombuffer(archive.read(info), np.uint8)
    header = mapped[info.header_offset : info.header_offset + 30].tobytes()
    name_length, extra_length = struct.unpack("<HH", header[26:])
    start = info.header_offset + 30 + name_length + extra_length
    return mapped[start : start + info.file_size]


def _view(data: np.ndarray, tensor: _Tensor) -> np.ndarray:
    storage, offset, size, stride = tensor
    dtype = _FROM_STORAGE[storage.dtype]
    numbers = (offset, *size, *stride)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError(f"offset {offset}, size {size} and strides {stride} make no tensor")
    if data.nbytes != storage.numel * dtype.itemsize:
        raise ValueError(f"{data.nbytes} bytes for {storage.numel} numbers of {dtype}")
    if 0 in size:
        return np.empty(size, dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.numel:
        raise ValueError(f"size {size} and strides {stride} reach beyond its {storage.numel} numbers")
    steps = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(data.view(dtype)[offset:], size, steps, writeable=False)


def _named(tree: Any, path: pathlib.Path, array: Callable[[str, _Tensor], np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an unpickled tree by dotted name."""
    while isinstance(tree, dict) and (inner := [tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)]):
        tree = inner[0]
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; want a dict of tensors (a state_dict).")
    tensors: dict[str, np.ndarray] = {}
    others: list[str] = []

    def walk(branch: dict, prefix: str, depth: int) -> None:
        if depth > 16:  # a pickle can hold a dict that holds itself
            raise ValueError(f"{path} nests dicts more than 16 deep at {prefix}.")
        for key, value in dict.items(branch):
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.", depth + 1)
            elif not isinstance(value, _Tensor):
                others.append(f"{name} ({type(value).__name__})")
            elif name in tensors:
                raise ValueError(f"{path} holds two tensors called {name}.")
            else:
                tensors[name] = array(name, value)

    walk(tree, "", 0)
    if others:
        raise ValueError(f"{path} holds more than tensors: {', '.join(others[:10])}. Save the state_dict alone.")
    return tensors


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _bytes(tensor: Any) -> memoryview:
    array = np.ascontiguousarray(np.asarray(tensor))
    return array.reshape(-1).view(np.uint8).data


def _nbytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, Any], metadata: str | None) -> None:
    # Widest types first, as the library does, so that every tensor is aligned to its type.
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({_METADATA: metadata} if metadata else {})}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += _nbytes(tensor)
        dtype = _TO_SAFETENSORS[np.dtype(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(_bytes(tensors[name]))


def _write_torch(file: IO[bytes], tensors: Mapping[str, Any], metadata: str | None) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def entry(name: str, data: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: equal weights give equal files
            info.file_size = len(data)
            gap = -(file.tell() + 30 + len(info.filename) + 4) % _ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap  # PyTorch's own padding field
            with archive.open(info, "w") as out:
                out.write(data)

        entry("data.pkl", _pickle(tensors))
        entry("byteorder", b"little")
        if metadata:
            entry(f"{_METADATA}.json", metadata.encode())
        for key, tensor in enumerate(tensors.values()):
            entry(f"data/{key}", _bytes(tensor))
        entry("version", b"3\n")


def _pickle(tensors: Mapping[str, Any]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of tensors, as PyTorch writes it.

    The opcodes are written out because `pickle` would import the modules whose names it writes.
    """

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # without its own start and stop

    def call(name: str, *arguments: bytes) -> bytes:
        return b"c" + name.encode() + b"\n(" + b"".join(arguments) + b"tR"

    out = [b"\x80\x02", call("collections\nOrderedDict")]
    for key, (name, tensor) in enumerate(tensors.items()):
        storage = f"ctorch\n{_TO_STORAGE[np.dtype(tensor.dtype)]}\n".encode()
        count = plain(math.prod(tensor.shape))
        persistent = b"(" + plain("storage") + storage + plain(str(key)) + plain("cpu") + count + b"tQ"
        shape = tuple(map(int, tensor.shape))
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        hooks = call("collections\nOrderedDict")
        rebuild = call(
            "torch._utils\n_rebuild_tensor_v2", persistent, plain(0), plain(shape), plain(strides), plain(False), hooks
        )
        out.append(plain(name) + rebuild + b"s")
    return b"".join([*out, b"."])
