"""Random access to tar files: where each file lies is found once and kept, after which a record is one read away."""

import os
import tarfile
import threading
import zipfile

import numpy as np

TarIndex = tuple[tuple[str, ...], np.ndarray, np.ndarray]  # endings [f]; offsets and sizes [samples, f], -1: no file


def load(path: str) -> TarIndex:
    """The index of one tar, read from its cache where size and time of the tar are still those it was made from.

    Raises:
      ValueError: naming the tar, if it is missing, compressed or cut short.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"the shard {path} cannot be read: {error.strerror}.") from error
    stamp = np.array([1, stat.st_size, stat.st_mtime_ns], np.int64)  # version of the index, then of the tar
    cache = os.environ.get("PE_JAX_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "pe_jax")
    elsewhere = os.path.join(cache, "tar_index", os.path.abspath(path).lstrip(os.sep).replace(os.sep, "%") + ".npz")
    for file in (path + ".index.npz", elsewhere):
        try:
            with np.load(file) as saved:
                if np.array_equal(saved["stamp"], stamp):
                    return tuple(saved["endings"].tolist()), saved["offsets"], saved["sizes"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            continue  # none yet, or cut short by a killed process
    endings, offsets, sizes = _scan(path)
    for file in (path + ".index.npz", elsewhere):
        partial = f"{file}.{os.getpid()}.partial"
        try:
            os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
            with open(partial, "wb") as out:
                np.savez(out, stamp=stamp, endings=np.array(endings, np.str_), offsets=offsets, sizes=sizes)
            os.replace(partial, file)
            break
        except OSError:
            continue  # a folder that may not be written; without an index the next run scans again
    return endings, offsets, sizes


def _scan(path: str) -> TarIndex:
    samples: list[dict[str, tuple[int, int]]] = []
    last = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                ending, key = ending.lower(), (folder, stem)
                if key != last or ending in samples[-1]:
                    samples.append({})
                last = key
                samples[-1][ending] = (member.offset_data, member.size)
            end = tar.offset
        # tarfile takes a damaged or missing header for the end; only zeros are the end.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end mark is missing, so it was probably cut short")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no readable, uncompressed tar: {error}.") from error
    endings = tuple(sorted({ending for sample in samples for ending in sample}))
    table = np.array([[sample.get(e, (-1, 0)) for e in endings] for sample in samples], np.int64)
    table = table.reshape(len(samples), len(endings), 2)
    return endings, table[..., 0].copy(), table[..., 1].copy()


class Files:
    """Open shards, shared between threads; one that is dropped closes when its last reader is done with it."""

    LIMIT = 256

    def __init__(self):
        self.files: dict[str, File] = {}
        self.lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self.lock:
            file = self.files.get(path)
            if file is None:
                if len(self.files) >= self.LIMIT:
                    self.files.pop(next(iter(self.files)))
                file = self.files[path] = File(path)
        return os.pread(file.fd, size, offset)


class File:
    """One open descriptor."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if hasattr(self, "fd"):
            close(self.fd)
