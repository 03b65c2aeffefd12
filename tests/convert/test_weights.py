import builtins
import collections
import json
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pe_jax.convert import weights

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def numbers(*shape: int, dtype: object = np.float32) -> np.ndarray:
    """What fixtures/make.py fills tensors with."""
    return ((np.arange(np.prod(shape)) - 2) / 4).reshape(shape).astype(dtype)


def equal(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def tensors_of_every_type() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 2, (3, 5)).astype(getattr(ml_dtypes, name, name)) for name in TYPES}
    strided = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    more = {"strided": strided.transpose(2, 0, 1), "scalar": np.float32(7).reshape(()), "empty": np.zeros((0, 4))}
    return made | more


def zipped(path: pathlib.Path, pickled: bytes, **entries: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


# ------------------------------------------------------------------------------------------- files written by PyTorch


def test_every_type_that_torch_wrote_is_read():
    read = weights.read(FIXTURES / "types.pt")
    assert list(read) == list(TYPES)
    for name in ("float64", "float32", "float16"):
        assert equal(read[name], numbers(2, 3, dtype=name))
    assert equal(read["bfloat16"], numbers(2, 3, dtype=ml_dtypes.bfloat16))
    assert equal(read["int64"], np.arange(-2, 3))
    for name in ("int32", "int16", "int8", "uint8"):
        assert equal(read[name], np.arange(5).astype(name))
    assert equal(read["bool"], np.array([True, False, True]))


def test_views_that_share_a_storage_are_read_with_their_strides_and_offsets():
    read, table = weights.read(FIXTURES / "views.pt"), numbers(4, 6)
    assert equal(read["whole"], table)
    assert equal(read["transposed"], table.T)
    assert equal(read["columns"], table[1:, ::2])
    assert equal(read["expanded"], np.broadcast_to(table[2], (3, 6)))
    assert equal(read["scalar"], np.array(2.5, np.float32))
    assert read["empty"].shape == (0, 7)
    assert np.shares_memory(read["whole"], read["columns"])


def test_arrays_are_views_of_the_mapped_file_and_cannot_be_changed():
    array = weights.read(FIXTURES / "types.pt")["float32"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_a_state_dict_entry_is_opened_and_what_lies_beside_it_ignored():
    read = weights.read(FIXTURES / "module.pt")
    assert list(read) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert equal(read["0.weight"], numbers(2, 3))


def test_parameters_and_deeper_dicts_are_read_by_dotted_name():
    read = weights.read(FIXTURES / "parameters.pt")
    assert equal(read["weight"], numbers(2, 3))
    assert equal(read["deeper.bias"], numbers(2))


def test_a_whole_pickled_module_is_refused_by_the_name_of_its_class():
    with pytest.raises(weights.RefusedPickle, match=r"torch\.nn\.modules\.container\.Sequential"):
        weights.read(FIXTURES / "whole_module.pt")


def test_a_file_of_pytorch_before_1_6_is_refused_with_the_way_to_resave_it():
    with pytest.raises(ValueError, match=r"before 1\.6.*torch\.save"):
        weights.read(FIXTURES / "legacy.pt")


# ------------------------------------------------------------------------------------------------------ hostile files


class Payload:
    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark: pathlib.Path) -> dict[str, object]:
    touch = f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Payload(os.system, f"touch {mark}"),
        "eval": Payload(builtins.eval, touch),
        "nested eval": {"state_dict": collections.OrderedDict(a=1, b={"c": [Payload(builtins.eval, touch)]})},
        "getattr": Payload(builtins.getattr, "a", "upper"),
        "numpy": {"a": np.zeros(2)},
    }


@pytest.mark.parametrize("name", ["os.system", "eval", "nested eval", "getattr", "numpy"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_names_anything_but_tensors_is_refused_and_not_run(tmp_path, name, protocol):
    mark = tmp_path / "ran"
    path = zipped(tmp_path / "bad.pt", pickle.dumps(payloads(mark)[name], protocol))
    with pytest.raises(weights.RefusedPickle, match=r"names .*nothing was run"):
        weights.read(path)
    assert not mark.exists()


def test_the_payloads_of_the_test_above_do_run_where_they_are_let():
    """Else the test above would show nothing."""
    assert pickle.loads(pickle.dumps(Payload(builtins.eval, "6 * 7"))) == 42


def test_a_pickle_cannot_change_the_reader_for_the_next_file(tmp_path):
    """BUILD sets attributes on whatever the pickle holds, the reader's own callables too."""
    build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x0c\x00\x00\x00__defaults__)ub."
    with pytest.raises(ValueError, match="want a dict"):
        weights.read(zipped(tmp_path / "bad.pt", build))
    assert equal(weights.read(FIXTURES / "types.pt")["float32"], numbers(2, 3))


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((4,), (1,), 1), ((2, 2), (4, 1), 0), ((-1,), (1,), 0), ((2,), (-1,), 1)]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, size, stride, offset):
    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain("0") + plain("cpu") + plain(4) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + plain(offset) + plain(size) + plain(stride) + b"tR"
    path = zipped(
        tmp_path / "bad.pt", b"\x80\x02}" + plain("name") + rebuild + b"s.", **{"data/0": bytes(16), "version": b"3\n"}
    )
    with pytest.raises(ValueError, match=r"damaged at name \((size|offset)"):
        weights.read(path)


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(ValueError, match="more than 16 deep"):
        weights.read(zipped(tmp_path / "bad.pt", pickle.dumps(loop, 2)))


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", b"\x80\x02cos\n", b"not a pickle", b"\x80\x02R."])
def test_a_damaged_pickle_is_an_error_about_the_file(tmp_path, pickled):
    with pytest.raises(ValueError, match=r"bad\.pt"):
        weights.read(zipped(tmp_path / "bad.pt", pickled))


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    weights.write(path, tensors_of_every_type())
    whole = path.read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            weights.read(path)


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path):
    weights.write(tmp_path / "good.pt", {"name": np.zeros(4, np.float32)})
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for entry in good.namelist():
            bad.writestr(entry, good.read(entry)[:12] if "data/" in entry else good.read(entry))
    with pytest.raises(ValueError, match="cut short or damaged at name"):
        weights.read(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"PK\x05\x06" + bytes(18), "neither"),
    ],
)
def test_a_file_that_is_no_weights_is_refused_with_what_it_is(tmp_path, content, message):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.read(tmp_path / "bad.pt")


def test_a_zip_that_pytorch_did_not_write_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"not one of PyTorch's"):
        weights.read(tmp_path / "bad.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        weights.read(tmp_path / "none.pt")


def test_what_is_not_a_tensor_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"more than tensors: epoch \(int\), names \(list\)"):
        weights.read(zipped(tmp_path / "bad.pt", pickle.dumps({"epoch": 3, "names": []}, 2)))


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_is_written_is_read_back_to_the_same_bytes(tmp_path, suffix):
    tensors, path = tensors_of_every_type(), tmp_path / "new" / f"x{suffix}"
    weights.write(path, tensors, {"architecture": {"width": 8}})
    read = weights.read(path)
    assert read.keys() == tensors.keys()
    assert all(equal(read[name], tensors[name]) for name in tensors)
    assert weights.read_metadata(path) == {"architecture": {"width": 8}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_equal_tensors_make_equal_files(tmp_path, suffix):
    for name in ("a", "b"):
        weights.write(tmp_path / f"{name}{suffix}", tensors_of_every_type(), {"b": 1, "a": 2})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_tensors_begin_at_multiples_of_64_bytes_in_a_pt(tmp_path):
    weights.write(tmp_path / "x.pt", {str(n): np.full(n, n, np.int8) for n in range(1, 40)})
    for array in weights.read(tmp_path / "x.pt").values():
        assert array.ctypes.data % 64 == 0


def test_the_library_reads_our_safetensors(tmp_path):
    tensors = tensors_of_every_type()
    weights.write(tmp_path / "x.safetensors", tensors)
    read = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(equal(read[name], np.array(tensors[name], order="C")) for name in tensors)


def test_we_read_the_librarys_safetensors(tmp_path):
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors_of_every_type().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    read = weights.read(tmp_path / "x.safetensors")
    assert all(equal(read[name], tensors[name]) for name in tensors)
    assert weights.read_metadata(tmp_path / "x.safetensors") == {}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    weights.write(path, {"a": np.zeros(3, np.float32)})

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, *_, **__):
            raise OSError("the device is gone")

    for suffix in (".pt", ".safetensors"):
        with pytest.raises(OSError, match="device is gone"):
            weights.write(path.with_suffix(suffix), {"a": Broken()})
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert weights.read(path)["a"].shape == (3,)


def test_an_unknown_suffix_or_type_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'\.bin' must be one of \.pt, \.pth, \.safetensors"):
        weights.write(tmp_path / "x.bin", {})
    with pytest.raises(ValueError, match="a is complex64"):
        weights.write(tmp_path / "x.pt", {"a": np.zeros(3, np.complex64)})
    assert not list(tmp_path.iterdir())


def test_a_file_may_be_rewritten_while_its_arrays_are_in_use(tmp_path):
    path = tmp_path / "x.pt"
    weights.write(path, {"a": np.arange(5)})
    read = weights.read(path)
    weights.write(path, {"a": read["a"][::-1]})
    assert read["a"].tolist() == [0, 1, 2, 3, 4]
    assert weights.read(path)["a"].tolist() == [4, 3, 2, 1, 0]


def test_compressed_entries_are_read_too(tmp_path):
    weights.write(tmp_path / "x.pt", {"a": np.arange(50)})
    with zipfile.ZipFile(tmp_path / "x.pt") as good, zipfile.ZipFile(tmp_path / "y.pt", "w", 8) as packed:
        for entry in good.namelist():
            packed.writestr(entry, good.read(entry))
    assert weights.read(tmp_path / "y.pt")["a"].tolist() == list(range(50))


def test_a_big_endian_file_is_refused(tmp_path):
    path = zipped(tmp_path / "x.pt", pickle.dumps({}, 2), byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        weights.read(path)


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / "model-1.safetensors")
    safetensors.numpy.save_file({"b": np.arange(5)}, tmp_path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / weights.INDEX).write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": places}))
    return tmp_path


def test_shards_are_read_through_their_index_or_their_folder(shards):
    for path in (shards, shards / weights.INDEX):
        read = weights.read(path)
        assert {name: len(value) for name, value in read.items()} == {"a": 3, "b": 5}
        assert weights.read_metadata(path) == {}


def test_a_missing_shard_is_named(shards):
    (shards / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        weights.read(shards)


def test_shards_that_hold_other_tensors_than_the_index_says_are_refused(shards):
    safetensors.numpy.save_file({"c": np.arange(5)}, shards / "model-2.safetensors")
    with pytest.raises(ValueError, match="disagree about 2 tensors: b, c"):
        weights.read(shards)


def test_an_index_cannot_point_outside_its_folder(shards):
    (shards / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="want the name of a file beside it"):
        weights.read(shards)


def test_a_folder_of_one_weight_file_stands_for_it_and_one_of_several_is_ambiguous(tmp_path):
    weights.write(tmp_path / "x.pt", {"a": np.arange(3)}, {"k": 1})
    assert list(weights.read(tmp_path)) == ["a"]
    assert weights.read_metadata(tmp_path) == {"k": 1}
    weights.write(tmp_path / "y.pt", {"a": np.arange(3)})
    with pytest.raises(ValueError, match=r"x\.pt, y\.pt\. Name one"):
        weights.read(tmp_path)
