"""Where a run reads and writes: a path of this machine, or the `gs://BUCKET/NAME` of a bucket that all hosts share.

`path` is the one way from what a user gave to either; both have pathlib's methods (etils.epath). A bucket has whole
objects that appear at once, and no appending, no renaming of folders and no locks.
"""

import importlib.util
import os

from etils import epath

BUCKET = "gs://"


def path(given: str | os.PathLike[str]) -> epath.Path:
    """What `given` names; relative paths stay relative.

    Raises:
      ValueError: for an address that is not `gs://BUCKET...`.
      ModuleNotFoundError: for one of a bucket, without the library that reads it.
    """
    text = os.fspath(given)
    if text.startswith("gs:/") and not text.startswith(BUCKET):
        raise ValueError(f"{text} was {BUCKET}{text[4:]} until pathlib.Path took a slash of it; give the text itself.")
    if "://" in text:
        if not text.startswith(BUCKET) or not text[len(BUCKET) :].partition("/")[0]:
            raise ValueError(f"{text}: want gs://BUCKET/FOLDER or a path of this machine.")
        if importlib.util.find_spec("gcsfs") is None:
            raise ModuleNotFoundError(
                f"{text}: a bucket needs gcsfs: pip install 'pe-jax[gcp]' (the extra `tpu` has it too)."
            )
        _forget_listings()
    return epath.Path(text)


def is_bucket(given: str | os.PathLike[str]) -> bool:
    return os.fspath(given).startswith(BUCKET)


def absolute(given: str | os.PathLike[str]) -> epath.Path:
    """As `path`, independent of the working directory."""
    return path(given if is_bucket(given) else os.path.abspath(given))


def reach(given: str | os.PathLike[str]) -> None:
    """Asks the bucket of `given` for one object, so that what bars us from it is known before any work is done.

    Raises:
      ValueError: saying why the bucket cannot be read. A local path needs no asking.
    """
    if not is_bucket(given):
        return
    import fsspec

    bucket = os.fspath(path(given)).removeprefix(BUCKET).partition("/")[0]
    try:
        fsspec.filesystem("gcs").ls(bucket, max_results=1)
    except FileNotFoundError as error:
        raise ValueError(f"{given}: there is no bucket {bucket}; create it, or correct its name.") from error
    except Exception as error:  # of many kinds: of HTTP, of the network, of whatever gave the credentials
        raise ValueError(
            f"{given}: the bucket {bucket} cannot be read ({' '.join(str(error).split()) or type(error).__name__}). "
            "Log in with `gcloud auth application-default login`, or give this machine's service account the role "
            "Storage Object Admin on it."
        ) from error


def write_text(file: epath.Path, text: str) -> None:
    """Writes a whole file, which never is there in part."""
    if is_bucket(file):
        file.write_text(text)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def _forget_listings() -> None:
    """gcsfs keeps every listing for ever, so that a host would never see what another one, or tensorstore, writes."""
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
