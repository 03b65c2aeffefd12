"""Names to paths, without a network: sockets are forbidden here, and the hub's library is played by a stand-in."""

import json
import os
import socket
import sys
import types

import pytest

from pe_jax import hub
from pe_jax.models import zoo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def sockets(monkeypatch):
    """Every attempt to open a connection fails the test that made it."""

    def refuse(*_, **__):
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Library:
    """As much of huggingface_hub as we use: repositories are dicts of file contents."""

    def __init__(self, repositories: dict[str, dict[str, str]], cached: dict[str, str] | None = None):
        self.repositories, self.cached, self.asked = repositories, cached or {}, []
        kinds = ("RepositoryNotFound", "RevisionNotFound", "GatedRepo", "EntryNotFound", "LocalEntryNotFound")
        names = [f"{kind}Error" for kind in kinds]
        self.errors = types.SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
        self.failure: Exception | None = None

    def try_to_load_from_cache(self, repo, file, revision=None):
        return self.cached.get(f"{repo}/{file}")

    def hf_hub_download(self, repo, file, *, revision, local_dir):
        self.asked.append(f"{repo}@{revision or 'main'}/{file}")
        if self.failure:
            raise self.failure
        if repo not in self.repositories:
            raise self.errors.RepositoryNotFoundError(repo)
        if file not in self.repositories[repo]:
            raise self.errors.EntryNotFoundError(file)
        path = local_dir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.repositories[repo][file])
        return str(path)


@pytest.fixture
def library(monkeypatch):
    def install(repositories: dict[str, dict[str, str]], **more) -> Library:
        made = Library(repositories, **more)
        monkeypatch.setitem(sys.modules, "huggingface_hub", made)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
        return made

    return install


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def put(cache, *parts: str):
    path = cache.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("weights")
    return str(path)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_released_name_is_the_file_of_its_name_in_facebooks_repository(cache, library, name):
    hf = library({f"facebook/{name}": {f"{name}.pt": "weights"}})
    assert hub.resolve(name) == str(cache / "hf" / "facebook" / name / f"{name}.pt")
    assert hf.asked == [f"facebook/{name}@main/{name}.pt"]


@pytest.mark.parametrize("offline", [True, False])
def test_what_lies_in_the_cache_is_found_by_name_without_library_or_network(cache, no_library, offline):
    path = put(cache, "hf", "facebook", "PE-Core-L14-336", "PE-Core-L14-336.pt")
    assert hub.resolve("PE-Core-L14-336", offline=offline) == path
    assert hub.resolve("hf://facebook/PE-Core-L14-336", offline=offline) == path
    assert hub.resolve("hf://facebook/PE-Core-L14-336/PE-Core-L14-336.pt", offline=offline) == path
    assert hub.resolve("hf://facebook/PE-Core-L14-336:PE-Core-L14-336.pt", offline=offline) == path


def test_a_repository_without_a_file_named_is_searched_for_the_usual_ones(library):
    hf = library({"timm/PE-Core-B-16": {"open_clip_model.safetensors": "weights"}})
    assert hub.resolve("hf://timm/PE-Core-B-16").endswith("open_clip_model.safetensors")
    assert [asked.split("/")[-1] for asked in hf.asked] == [
        "PE-Core-B-16.pt",
        "model.safetensors",
        "open_clip_model.safetensors",
    ]
    hf.asked.clear()
    assert hub.resolve("hf://timm/PE-Core-B-16").endswith("open_clip_model.safetensors")
    assert not hf.asked, "what is in the cache is not asked about again"


def test_a_revision_and_a_file_in_a_folder_have_their_own_place(cache, library):
    library({"org/repo": {"sub/x.safetensors": "weights"}})
    path = hub.resolve("hf://org/repo@v1.0/sub/x.safetensors")
    assert path == str(cache / "hf" / "org" / "repo@v1.0" / "sub" / "x.safetensors")


def test_the_shards_of_an_index_are_fetched_with_it(library):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    library({"org/repo": {"sub/" + hub.INDEX: index, "sub/one.safetensors": "1", "sub/two.safetensors": "2"}})
    folder = os.path.dirname(hub.resolve(f"hf://org/repo/sub/{hub.INDEX}"))
    assert sorted(os.listdir(folder)) == [hub.INDEX, "one.safetensors", "two.safetensors"]


def test_the_hub_librarys_own_cache_is_used_too(library):
    hf = library({}, cached={"facebook/PE-Core-S16-384/PE-Core-S16-384.pt": "/elsewhere/x.pt"})
    assert hub.resolve("PE-Core-S16-384", offline=True) == "/elsewhere/x.pt"
    assert not hf.asked


@pytest.mark.parametrize("by", ["argument", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody_and_says_which_file_to_put_where(cache, library, by, monkeypatch):
    hf = library({"facebook/PE-Core-T16-384": {"PE-Core-T16-384.pt": "weights"}})
    if by != "argument":
        monkeypatch.setenv(by, "1")
    with pytest.raises(FileNotFoundError) as caught:
        hub.resolve("PE-Core-T16-384", offline=by == "argument")
    assert not hf.asked
    place = cache / "hf" / "facebook" / "PE-Core-T16-384" / "PE-Core-T16-384.pt"
    assert "offline" in str(caught.value) and f"put it at {place}" in str(caught.value)
    place.parent.mkdir(parents=True)
    place.write_text("weights")
    assert hub.resolve("PE-Core-T16-384", offline=True) == str(place)


def test_offline_with_the_real_library_opens_no_socket():
    pytest.importorskip("huggingface_hub")
    with pytest.raises(FileNotFoundError, match="offline nothing is fetched"):
        hub.resolve("PE-Core-T16-384", offline=True)


def test_without_the_library_the_error_says_how_to_get_it_and_what_else_to_do(no_library):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pe-jax\[hf\]'.*fetch PE-Core-T16-384\.pt"):
        hub.resolve("PE-Core-T16-384")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LocalEntryNotFoundError", "The network did not give facebook/PE-Core-T16-384/.*put it at"),
        ("RepositoryNotFoundError", "facebook/PE-Core-T16-384 does not exist"),
        ("RevisionNotFoundError", "has no revision main"),
        ("GatedRepoError", "asks for its terms to be accepted"),
        ("EntryNotFoundError", r"has no file PE-Core-T16-384\.pt"),
    ],
)
def test_each_failure_of_the_hub_says_what_to_do(library, kind, message):
    hf = library({})
    hf.failure = getattr(hf.errors, kind)("no")
    with pytest.raises(FileNotFoundError, match=message):
        hub.resolve("PE-Core-T16-384")


def test_a_connection_that_breaks_is_told_with_its_cause(library):
    hf = library({})
    hf.failure = TimeoutError("read timed out")
    with pytest.raises(FileNotFoundError, match=r"failed \(TimeoutError: read timed out\).*try again"):
        hub.resolve("PE-Core-T16-384")


@pytest.mark.parametrize("url", ["hf://org", "hf://org/repo/../../etc", "hf://../repo/x", "hf:///x", "hf://o/r/a b"])
def test_an_address_of_another_form_is_refused(url):
    with pytest.raises(ValueError, match=r"want hf://ORG/REPO\[@REVISION\]\[/FILE\]"):
        hub.resolve(url)
    with pytest.raises(ValueError, match="want a released name"):
        hub.resolve("s3://bucket/x.pt")


def test_a_local_path_is_itself_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "x.pt").write_text("weights")
    assert hub.resolve(tmp_path / "x.pt") == str(tmp_path / "x.pt")
    assert hub.resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt is neither a released model's name nor a file"):
        hub.resolve("none.pt")


def test_the_cache_is_in_the_home_folder_unless_the_variable_says_otherwise(monkeypatch):
    monkeypatch.delenv("PE_JAX_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(hub.cache()) == "/home/someone/.cache/pe_jax"
