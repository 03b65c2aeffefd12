"""Where weights are: released names, `hf://`, `gs://` and local paths, resolved to a local file or folder.

Everything fetched lies under one cache in plain folders, `CACHE/hf/ORG/REPO/FILE`, so that a file brought by hand on a
machine without network is found there too, without any library. CACHE is `$PE_JAX_CACHE`, or `~/.cache/pe_jax`.
"""

import json
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

from pe_jax import paths

INDEX = "model.safetensors.index.json"  # of a repository whose weights are cut into shards
_FILES = (".pt", ".pth", ".safetensors")
# What a repository's weights are called, in the order tried, when no file is named; {} is the repository.
_USUAL = ("{}.pt", "model.safetensors", "open_clip_model.safetensors", "{}.safetensors", INDEX)
# The released models' home. Which of these names exist is `zoo`'s to say.
_RELEASED = re.compile(r"PE-(Core|Lang|Spatial)-[TSBLG]\d+-\d+(-Tiling)?")


class _Remote(NamedTuple):
    org: str
    repo: str
    revision: str | None
    file: str | None

    @property
    def id(self) -> str:
        return f"{self.org}/{self.repo}"

    @property
    def folder(self) -> pathlib.Path:
        at = f"@{self.revision}" if self.revision else ""
        return cache() / "hf" / self.org / f"{self.repo}{at}"


def cache() -> pathlib.Path:
    """The folder that everything fetched lies under: `$PE_JAX_CACHE`, or `~/.cache/pe_jax`."""
    return pathlib.Path(os.environ.get("PE_JAX_CACHE") or "~/.cache/pe_jax").expanduser()


def resolve(name_or_url: str | os.PathLike, offline: bool = False) -> str:
    """The local file or folder that a name stands for, fetched if it must be; the library shows the progress.

    Args:
      name_or_url: one of
        - a released name, `PE-Core-L14-336`: the file `PE-Core-L14-336.pt` of `hf://facebook/PE-Core-L14-336`;
        - `hf://ORG/REPO[@REVISION][/FILE]`, without FILE the repository's weights by their usual names;
        - `gs://BUCKET/PATH`: a file is fetched, a directory (an Orbax checkpoint) is returned as it is;
        - a local path. Write `./PE-Core-L14-336` for a folder that is called like a model.
      offline: use only what is in the cache and open no connection; so does `HF_HUB_OFFLINE=1`. What is in the cache
        is never fetched or asked about again, offline or not.

    Raises:
      FileNotFoundError: if it is nowhere, or cannot be fetched; says which file to fetch and where to put it.
      ModuleNotFoundError: if the library that fetches it is not installed; says how to install it.
      ValueError: for an address that is not of these forms, or a bucket that cannot be read; says why.
    """
    name = os.fspath(name_or_url)
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if _RELEASED.fullmatch(name):
        return _hub(_Remote("facebook", name, None, f"{name}.pt"), offline)
    if name.startswith("hf://"):
        return _hub(_parse(name), offline)
    if name.startswith("gs://"):
        return _bucket(name, offline)
    if "://" in name:
        raise ValueError(f"{name}: want a released name, hf://ORG/REPO[/FILE], gs://BUCKET/PATH or a local path.")
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name} is neither a released model's name nor a file or folder here.")
    return str(path)


def _parse(url: str) -> _Remote:
    match = re.fullmatch(r"hf://([\w.-]+)/([\w.-]+)(?:@([\w.-]+))?(?:[/:]([\w./-]+))?", url)
    parts = match.groups() if match else ()
    if not match or any(part in (".", "..") for group in parts if group for part in group.split("/")):
        raise ValueError(f"{url}: want hf://ORG/REPO[@REVISION][/FILE].")
    return _Remote(*parts)


# --------------------------------------------------------------------------------------------------- Hugging Face hub


def _hub(remote: _Remote, offline: bool) -> str:
    names = (remote.file,) if remote.file else tuple(name.format(remote.repo) for name in _USUAL)
    for name in names:
        if (path := _kept(remote, name)) is not None:
            return _with_shards(path, remote, offline)
    if offline:
        raise FileNotFoundError(f"{remote.id} is not in the cache, and offline nothing is fetched. {_by_hand(remote)}")
    for name in names:
        if (path := _fetch(remote, name)) is not None:
            return _with_shards(path, remote, offline)
    revision = f" at revision {remote.revision}" if remote.revision else ""
    raise FileNotFoundError(f"{remote.id}{revision} has no file {' or '.join(names)}; look which it has, and name one.")


def _kept(remote: _Remote, name: str) -> pathlib.Path | None:
    """The file in our cache, or in the hub library's own if that was filled by another program."""
    path = remote.folder / name
    if path.is_file():
        return path
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    found = huggingface_hub.try_to_load_from_cache(remote.id, name, revision=remote.revision)
    return pathlib.Path(found) if isinstance(found, str) else None


def _fetch(remote: _Remote, name: str) -> pathlib.Path | None:
    """Downloads one file into our cache; None if the repository has no such file."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub import errors  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModuleNotFoundError(
            f"{remote.id} is not in the cache, and fetching it needs huggingface_hub: pip install 'pe-jax[hf]'. "
            f"{_by_hand(remote)}"
        ) from None
    try:
        return pathlib.Path(
            huggingface_hub.hf_hub_download(remote.id, name, revision=remote.revision, local_dir=remote.folder)
        )
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{remote.id} asks for its terms to be accepted: do so on its page, then log in with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{remote.id} does not exist, has no revision {remote.revision or 'main'}, or is private: check the name, "
            "or log in with `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:  # the library's word for a network that does not answer
        raise FileNotFoundError(f"The network did not give {remote.id}/{name}. {_by_hand(remote)}") from error
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # the HTTP library differs between versions of the hub's
        raise FileNotFoundError(
            f"Fetching {remote.id}/{name} failed ({type(error).__name__}: {error}). What arrived is kept: try again. "
            f"{_by_hand(remote)}"
        ) from error


def _with_shards(path: pathlib.Path, remote: _Remote, offline: bool) -> str:
    """The path, once all shards that it lists, if it is an index, lie beside it."""
    if path.name.endswith(".index.json"):
        for shard in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            beside = path.parent.relative_to(remote.folder) / shard if remote.folder in path.parents else shard
            _hub(remote._replace(file=str(beside)), offline)
    return str(path)


def _by_hand(remote: _Remote) -> str:
    name = remote.file or _USUAL[0].format(remote.repo)
    return (
        f"To bring it by hand, fetch {name} of {remote.id} from the Hugging Face hub on a machine with network and put "
        f"it at {remote.folder / name} (PE_JAX_CACHE moves this folder), or give the file's own path."
    )


# ----------------------------------------------------------------------------------------------------------- buckets


def _bucket(url: str, offline: bool) -> str:
    kept = cache() / "gs" / url.removeprefix("gs://")
    is_file = url.endswith(_FILES)
    if is_file and kept.is_file():
        return str(kept)
    if offline:
        what = f"is not in the cache ({kept})" if is_file else "is a directory of a bucket"
        raise FileNotFoundError(f"{url} {what}, and offline nothing is fetched. Copy it here and give its path.")
    source: Any = paths.path(url)
    paths.reach(url)
    if not source.exists():
        raise FileNotFoundError(f"{url} does not exist, though its bucket does; look for its name there.")
    if not is_file:
        return url
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f".{kept.name}.{os.getpid()}.part")
    try:
        with source.open("rb") as file, open(part, "wb") as copy:
            shutil.copyfileobj(file, copy, 16 << 20)
        part.replace(kept)
    finally:
        part.unlink(missing_ok=True)
    return str(kept)
