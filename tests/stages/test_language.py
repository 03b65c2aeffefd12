"""The language stage: whose tokens its loss is the mean of, on any mesh; what moves; what a run starts from."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from experiments import align_language
from pe_jax import checkpoint, initial, sharding, train
from pe_jax.convert import decoder as decoder_files
from pe_jax.convert import vlm as vlm_files
from pe_jax.models import zoo
from pe_jax.stages import Language
from pe_jax.types import split
from tests.data import vocabularies

TOWER = {
    "image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 4, "mlp_width": 48, "class_token": True,
    "pool": "attention", "pool_heads": 2, "output_width": 24,
}  # fmt: skip
DECODER = {
    "vocab_size": vocabularies.BASE + 256, "width": 40, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 10,
    "mlp_width": 56, "context_length": 128, "rope_theta": 1e4,
}  # fmt: skip
SPEC = {
    "vision": TOWER, "decoder": DECODER, "tap": 2, "pooling": 2, "image_token": vocabularies.IMAGE, "layer_scale": 0.1,
}  # fmt: skip
ARCH = zoo.architecture(SPEC)
ROWS, LENGTH, CHUNKS, TOKENS = 8, 20, 3, 4  # 16 patches of a chunk, pooled by four


def batch(rows=ROWS):
    """Rows of two packed samples and padding; what is asked for is unequal, and in one row nothing is."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabularies.BASE, (rows, LENGTH), dtype=np.int32)
    segments = np.repeat([[1, 2, 0]], rows, 0).repeat([11, 6, 3], 1).astype(np.int32)
    slots = np.full((rows, LENGTH), -1, np.int32)
    slots[:, 1:9] = rng.permuted(np.repeat([np.arange(8)], rows, 0), axis=1)
    slots[:, 11:15] = np.arange(8, 12)
    tokens[slots >= 0] = vocabularies.IMAGE
    asked = rng.random((rows, LENGTH)) < np.linspace(0, 0.9, rows)[:, None]
    asked &= (slots < 0) & (segments > 0)
    targets = np.where(asked, np.roll(tokens, -1, 1), -1).astype(np.int32)
    chunks = rng.integers(0, 256, (rows, CHUNKS, 16, 16, 3), dtype=np.uint8)
    return {"tokens": tokens, "targets": targets, "segments": segments, "slots": slots, "chunks": chunks}


def made(config, seed=0):
    """Structure and parameters of an architecture, drawn without compiling its initialisation: scales about 1."""
    graphdef, abstract = split(zoo.abstract(config))
    rng = np.random.default_rng(seed)

    def draw(keys, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return noise + 1 if keys[-1].key == "scale" else noise

    return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)


def run(stage, mesh=None):
    graphdef, params = made(ARCH)

    def step(params, batch):
        return stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2))

    if mesh is None:
        return jax.jit(step)(params, batch())
    shardings = sharding.param_shardings(zoo.abstract(ARCH), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        return jax.jit(step, out_shardings=(shardings, None))(placed, sharding.global_batch(batch(), mesh))


def same(got, want, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(a) - b) / (np.linalg.norm(b) or 1)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.fixture(scope="module")
def whole():
    return run(Language(ARCH))


def test_the_loss_is_the_mean_over_every_token_that_is_asked_for(whole):
    graphdef, params = made(ARCH)
    given = batch()
    model = nnx.merge(graphdef, params)
    logits = model(given["tokens"], given["chunks"] / np.float32(127.5) - 1, given["slots"], given["segments"])
    scores = np.asarray(jax.nn.log_softmax(logits))
    asked = np.argwhere(given["targets"] >= 0)
    want = -np.mean([scores[row, at, given["targets"][row, at]] for row, at in asked])
    np.testing.assert_allclose(whole[1]["loss"], want, rtol=1e-5)
    assert whole[1]["tokens"] == len(asked) and 0 <= whole[1]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [(None, 4), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)],
    ids=str,
)
def test_micro_batches_and_meshes_give_the_gradient_of_the_whole_batch(whole, mesh, microbatches):
    stage = Language(ARCH, microbatches=microbatches, loss_chunk=7)
    grads, metrics = run(stage, mesh and sharding.make_mesh(mesh))
    same(metrics, whole[1], 1e-5)
    same(grads, whole[0], 1e-5 if mesh is None else 1e-4)  # devices sum in another order


def test_an_update_counts_forward_passes_and_the_gradients_that_are_taken():
    shapes = {name: np.empty(x.shape) for name, x in batch().items()}

    def flops(**fields):
        return Language(ARCH, **fields).update_flops(shapes)

    vision = ROWS * CHUNKS * zoo.forward_flops(ARCH.vision, 16)
    projector = ROWS * CHUNKS * 2 * (16 * 32 * 40 + TOKENS * 40 * 40)
    attention = 2 * LENGTH * (40 * (2 * 4 * 10 + 2 * 2 * 10) + 3 * 40 * 56) + 4 * LENGTH**2 * 40
    decoder = ROWS * (2 * attention + 2 * LENGTH * (vocabularies.BASE + 256) * 40)
    assert flops() == 3 * (vision + projector + decoder)
    assert flops(frozen=("vision",)) == vision + 2 * projector + 3 * decoder
    assert flops(frozen=("vision", "decoder")) == vision + 2 * projector + 2 * decoder
    assert flops(frozen=("vision", "projector")) == vision + projector + 3 * decoder


# ---- what a run starts from


def start(stage, fresh, part, config, params):
    return jax.jit(lambda fresh, params: stage.start(fresh, {part: (config, params)}))(fresh, params)


def test_a_tower_is_cut_at_the_tap_and_gets_fresh_layer_scales_or_such_as_change_nothing():
    given = zoo.architecture(TOWER)
    whole, tower = made(given, 3)
    graphdef, fresh = made(ARCH)
    for scale in ("scale1", "scale2"):
        fresh["vision"]["blocks"][scale]["gamma"] = np.full((2, 32), 0.1, np.float32)
    images = np.random.default_rng(5).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    want = nnx.merge(whole, tower).features(images, (2,))[2]
    for keep in (False, True):
        started = start(Language(ARCH, keep_function=keep), fresh, "vision", given, tower)
        assert (np.asarray(started["vision"]["blocks"]["scale2"]["gamma"]) == np.float32(0.1)).all()
        got = nnx.merge(graphdef, started).vision(images)
        assert np.allclose(got, want, atol=1e-4) == keep
        assert jax.tree.all(jax.tree.map(np.array_equal, started["decoder"], fresh["decoder"]))


def test_a_sub_stage_starts_from_the_one_before_it_which_had_no_layer_scales():
    before = zoo.architecture({**SPEC, "layer_scale": None, "pooling": 1})
    _, given = made(before, 3)
    _, fresh = made(ARCH)
    started = start(Language(ARCH), fresh, "model", before, given)
    for part in ("projector", "decoder"):
        same(started[part], given[part], 1e-9)
    blocks = {name: x for name, x in started["vision"]["blocks"].items() if not name.startswith("scale")}
    same(blocks, given["vision"]["blocks"], 1e-9)
    scales = {name: started["vision"]["blocks"][name] for name in ("scale1", "scale2")}
    same(scales, {name: fresh["vision"]["blocks"][name] for name in scales}, 1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tap": 1}, "'init.model' are of another tower: it has 1 blocks, want at least 2"),
        ({"projector": "linear"}, "projector of init.model does not fit: down/kernel is"),
        ({"decoder": {**DECODER, "mlp_width": 60}}, "decoder of init.model does not fit: blocks/mlp/down/kernel is"),
    ],
)
def test_weights_that_do_not_fit_are_refused_naming_what_differs(change, message):
    other = zoo.architecture({**SPEC, **change})
    stage = Language(ARCH)
    _, fresh = split(nnx.eval_shape(lambda: stage.build(nnx.Rngs(0))))
    _, given = split(zoo.abstract(other))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda fresh, given: stage.start(fresh, {"model": (other, given)}), fresh, given)


def test_positions_are_brought_to_the_grid_of_larger_images():
    larger = zoo.architecture({**SPEC, "image_size": 24})
    _, tower = made(zoo.architecture(TOWER), 3)
    fresh = made(larger)[1]
    position = start(Language(larger), fresh, "vision", zoo.architecture(TOWER), tower)["vision"]["position"]
    assert position.shape == (1 + 36, 32)
    np.testing.assert_array_equal(position[0], tower["position"][0])


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Conversations about made-up pictures, a tokenizer, a tower and a decoder in their own files."""
    folder = tmp_path_factory.mktemp("language")
    rng = np.random.default_rng(7)
    vocabularies.llama(folder)
    with open(folder / "talk.jsonl", "w") as file:
        for i in range(40):
            image = rng.integers(0, 256, (rng.integers(9, 40), rng.integers(9, 40), 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(folder / f"{i}.png")
            turns = [{"from": "human", "value": "What is there?"}, {"from": "assistant", "value": "yes " * (1 + i % 5)}]
            file.write(json.dumps({"image": f"{i}.png", "conversations": turns}) + "\n")
    tower = zoo.architecture(TOWER)
    _, params = made(tower, 1)
    checkpoint.save_weights(folder / "tower", params, {"architecture": zoo.to_dict(tower)})
    reader = zoo.decoder(DECODER)
    (folder / "decoder").mkdir()
    decoder_files.write(folder / "decoder", made(ARCH, 2)[1]["decoder"], reader, "hf")
    return folder


def small(arg, folder, **changes):
    """An experiment's config with a small model, batches and rows."""
    config = align_language.get_config(f"{arg},data={folder}/talk.jsonl,tokenizer={folder}").to_dict()
    arch = config["stage"]["arch"]
    keep = {name: arch[name] for name in ("projector", "pooling", "layer_scale", "drop_path") if name in arch}
    config["stage"]["arch"] = SPEC | {"layer_scale": None} | keep
    rows = 8
    config |= {
        "batch_size": rows,
        "phases": [{"image_size": 16, "examples": 6 * rows}],
        "mesh": {"data": -1},
        "checkpoint": {"every_steps": 2, "keep": 9},
        "log_every_steps": 1,
    }
    config["optimizer"] |= {"warmup_examples": 2 * rows, "learning_rate": 1e-3}
    config["data"] |= {"length": 200, "chunks": 4, "max_tiles": 1, "frames": 1, "threads": 2, "max_bad_records": 0}
    return config | changes


def losses(workdir):
    with open(workdir / "losses.csv", newline="") as file:
        return [(row["batch"], row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def warmed(folder):
    """A warm-up that began with the tower and the decoder of the folder."""
    workdir = folder / "warmup"
    config = small("warmup,3B", folder, init={"vision": str(folder / "tower"), "decoder": str(folder / "decoder")})
    assert train.train(config, workdir) == 0
    return workdir


def test_a_run_may_start_from_a_model_in_the_layout_of_transformers(folder):
    params = made(ARCH, 4)[1]
    vlm_files.write(folder / "plm", params, ARCH, "hf")
    config, got = initial.read(str(folder / "plm"), ARCH, sharding.make_mesh({"data": 2, "fsdp": 4}))
    assert (config.decoder.width, config.pooling) == (ARCH.decoder.width, ARCH.pooling)
    same(got, params, 1e-9)
    assert "fsdp" in str(got["decoder"]["embedding"].sharding.spec)


def test_a_warm_up_starts_from_released_weights_and_moves_the_projector_alone(folder, warmed):
    params, metadata = checkpoint.load_weights(warmed)
    tower, _ = checkpoint.load_weights(folder / "tower")
    _, decoder = decoder_files.read(folder / "decoder", zoo.decoder(DECODER))
    same(params["decoder"], decoder, 1e-9)
    early, _ = checkpoint.load_weights(warmed / "checkpoints" / "2")
    assert not np.allclose(params["projector"]["up"]["kernel"], early["projector"]["up"]["kernel"])
    kept = ("patch", "class_token", "position", "norm_pre")
    same({name: params["vision"][name] for name in kept}, {name: tower[name] for name in kept}, 1e-9)
    same(params["vision"]["blocks"], jax.tree.map(lambda x: x[:2], tower["blocks"]), 1e-9)
    assert metadata["preprocess"]["filter"] == "bicubic" and metadata["preprocess"]["size"] == [16, 16]
    assert zoo.architecture(metadata["architecture"]) == zoo.architecture({**SPEC, "layer_scale": None, "pooling": 1})


def test_mid_training_goes_on_from_a_warm_up_and_from_a_saved_step_on_another_mesh_to_the_same_losses(warmed, folder):
    def config(**mesh):
        changed = small("midtrain,3B,pack=2", folder, init={"model": str(warmed)}, mesh=mesh)
        return changed | {"data": changed["data"] | {"samples_per_row": 1.5}}

    whole, killed = folder / "whole", folder / "killed"
    assert train.train(config(data=8), whole) == 0
    # What kill -9 leaves after the second step was saved: that step, the config, and figures up to some later one.
    for name in ("checkpoints/2", "config.json", "losses.csv"):
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, killed / name)
    want = losses(whole)
    assert train.train(config(data=2, fsdp=2, tensor=2), killed) == 0
    got = losses(killed)
    assert [records for records, _ in got] == [records for records, _ in want] and len(got) == 6
    assert got[:2] == want[:2] and got[2:] != want[2:]
    # 1e-4: another mesh sums in another order
    np.testing.assert_allclose([float(x) for _, x in got], [float(x) for _, x in want], rtol=1e-4)
    params, _ = checkpoint.load_weights(killed)
    assert params["vision"]["blocks"]["scale1"]["gamma"].shape == (2, 32)


# ---- the experiment


@pytest.mark.parametrize("stage", align_language.STAGES)
@pytest.mark.parametrize("size", align_language.MODELS)
def test_every_stage_of_every_size_is_complete_and_its_rows_have_room_for_what_they_may_hold(stage, size):
    run = train.parse(align_language.get_config(f"{stage},{size}").to_dict())
    specs = train.batch_spec(run, run.phases[0])
    tokens = run.stage.arch.chunk_tokens(run.image_size)
    assert specs["tokens"].shape[1] > tokens * (specs["chunks"].shape[1] if stage in ("midtrain", "sft") else 1)
    train.optimizer_of(run)
    assert run.stage.update_flops(specs) > 0


def test_of_the_trained_model_the_tower_is_exported(folder, warmed, capsys):
    from pe_jax import cli
    from pe_jax.convert import pe, weights

    file = folder / "lang.safetensors"
    assert cli.main(["convert", str(warmed), str(file), "--to", "meta"]) == 0
    assert "Verified" in capsys.readouterr().out
    config = zoo.architecture(weights.read_metadata(file)["architecture"])
    assert config == dataclasses.replace(ARCH.vision, layer_scale=None)
    same(pe.to_params(weights.read(file), config), checkpoint.load_weights(warmed)[0]["vision"], 1e-9)


@pytest.mark.parametrize(
    ("arg", "frozen", "layer_scale", "projector", "depth"),
    [
        ("midtrain,1B,tower=G,unfrozen=no,reg=no", True, None, "mlp", 47),
        ("midtrain,3B,unfrozen=no,reg=no", True, None, "mlp", 47),
        ("midtrain,3B,reg=no", False, None, "mlp", 47),
        ("midtrain,3B,unfrozen=no,reg=no,projector=linear", True, None, "linear", 47),
        ("midtrain,3B,unfrozen=no,reg=no,layer=50", True, None, "mlp", 50),
        ("midtrain,3B,unfrozen=no,reg=no,layer=41", True, None, "mlp", 41),
        ("midtrain,3B,unfrozen=no", True, 0.1, "mlp", 47),
        ("midtrain,3B", False, 0.1, "mlp", 47),
    ],
)
def test_the_rows_of_the_ablation_say_what_they_change(arg, frozen, layer_scale, projector, depth):
    run = train.parse(align_language.get_config(arg + ",millions=20").to_dict())
    arch = run.stage.arch
    assert (arch.vision.layer_scale, arch.vision.drop_path) == (layer_scale, layer_scale or 0.0)
    assert (
        arch.projector == projector
        and arch.vision.depth == depth
        and run.examples(run.steps) == pytest.approx(2e7, rel=1e-3)
    )
    assert run.stage.trainable("vision/blocks/mlp/up/kernel") == (not frozen)
    moved = [path for path, (_, moves) in train._parameters(run.stage).items() if moves and path.startswith("vision")]
    scales = ["vision/blocks/scale1/gamma", "vision/blocks/scale2/gamma"]
    assert not frozen or sorted(moved) == (scales if layer_scale else [])


def test_the_published_runs_have_the_published_numbers():
    def run(arg):
        return train.parse(align_language.get_config(arg).to_dict())

    middle, last, packed = run("midtrain,3B"), run("sft,8B"), run("midtrain,3B,pack=4")
    assert middle.examples(middle.steps) / 1e6 == pytest.approx(71.68) and middle.phases[0].batch_size == 2048
    assert (middle.optimizer.learning_rate, middle.optimizer.weight_decay) == (4e-5, 0.01)
    assert (last.optimizer.learning_rate, last.optimizer.weight_decay, last.steps) == (1e-5, 0.05, 21_000)
    assert train.batch_spec(last, last.phases[0])["chunks"].shape == (1024, 37, 448, 448, 3)
    assert (packed.steps, packed.phases[0].batch_size) == (middle.steps, 512)
    bench = run("bench,qwen7B,tower=PE-Core-B16-224,layer=9")
    assert train.batch_spec(bench, bench.phases[0])["tokens"].shape == (256, 14**2 + 2048)
    assert bench.stage.arch.vision.depth == 9 and bench.stage.arch.image_token == 151_655


@pytest.mark.parametrize(
    "arg", ["midtrain", "align,3B", "midtrain,4B", "sft,8B,units=3", "midtrain,3B,reg=maybe", "bench,8B,tower=mine"]
)
def test_what_is_no_experiment_is_refused(arg):
    with pytest.raises(ValueError, match=r"align_language\.py"):
        align_language.get_config(arg)
