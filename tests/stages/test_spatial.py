"""Spatial alignment: what is hidden, what each teacher is compared with, and that no teacher ever moves."""

import csv
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pe_jax
from experiments import align_spatial
from pe_jax import checkpoint, optim, sharding, train
from pe_jax.models import zoo
from pe_jax.models.vision import VisionConfig, VisionTower
from pe_jax.stages import Spatial, teachers
from pe_jax.types import split

CORE = VisionConfig(32, 8, 32, 3, 4, 48, True, "attention", 20, pool_heads=2)  # what a student starts from
STUDENT = dataclasses.replace(CORE, pool="none", norm_post=False, output_width=None, layer_scale=0.1)
OTHER = VisionConfig(20, 4, 24, 2, 2, 40, False, "none", None, norm_post=False)  # a teacher of another make
SELF = {"name": "tower", "layer": 2, "direct": 1.0}
PAIRS = {"name": "tower", "arch": dataclasses.asdict(OTHER), "pairs": 0.5, "temperature": 3.0}
STORED = {"name": "stored", "tokens": 24, "width": 24, "pairs": 0.5, "temperature": 3.0}
STAGE = Spatial(STUDENT, {"self": SELF, "other": PAIRS}, teacher_dtype="float32", pairs_chunk=7)
GRID = 4, 6  # of 32 x 48 pixels


def batch(examples=8):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (examples, 32, 48, 3), dtype=np.uint8)}


def drawn(make, seed=1):
    """A module's structure, and parameters that are all random, norms and biases too, without running its own draws."""
    graphdef, params = split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1 if path[-1].key in ("scale", "gamma") else 0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, params)


def parts(stage):
    return drawn(lambda: stage.build(nnx.Rngs(0)))


def step(stage):
    graphdef, params = parts(stage)
    run = jax.jit(lambda params, batch: stage.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2)))
    return (params, *run(params, batch()))


@functools.cache
def whole():
    return step(STAGE)


def test_three_quarters_of_the_squares_are_hidden_whole_and_in_each_image_at_places_of_its_own():
    hidden = np.asarray(dataclasses.replace(STAGE, mask_ratio=0.75).hidden(jax.random.key(0), 50, (8, 6)))
    squares = hidden.reshape(50, 4, 2, 3, 2).transpose(0, 1, 3, 2, 4).reshape(50, 12, 4)
    assert (squares.all(-1) == squares.any(-1)).all()
    assert (squares.all(-1).sum(1) == 9).all()
    assert len(np.unique(hidden, axis=0)) > 40
    assert (hidden.mean(0) > 0.5).all()


def test_the_loss_is_the_weighted_sum_of_both_over_all_tokens_of_a_masked_student_and_teachers_that_see_all():
    params, _, metrics = whole()
    images = jnp.asarray(batch()["image"], jnp.float32) / 127.5 - 1
    hidden = STAGE.hidden(jax.random.split(jax.random.key(2))[0], 8, GRID)
    assert 0 < hidden.mean() < 1

    def tower(config, params, **changes):
        graphdef, _ = split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
        return nnx.merge(graphdef, params)

    held = params["training"]["teachers"]
    student = tower(STUDENT, {name: x for name, x in params.items() if name != "training"})
    tokens = np.float64(student.tokens(images, masked=hidden, mask_token=jnp.zeros(32)))[:, 1:]
    first = tower(STAGE.teachers[0][1].config(STUDENT), held["self"])
    first = np.float64(first.features(images, (2,))[2])[:, 1:]
    other = np.float64(tower(OTHER, held["other"]).features(images, (-1,))[-1])
    other = np.asarray(jax.image.resize(other.reshape(8, 8, 12, 24), (8, *GRID, 24), "bilinear")).reshape(8, 24, 24)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    cosine = (unit(tokens) * unit(first)).sum(-1).mean()
    student_pairs, teacher_pairs = (unit(x) @ unit(x).transpose(0, 2, 1) for x in (tokens, other))
    pairs = ((student_pairs - np.exp(3 * (teacher_pairs - 1))) ** 2).mean()
    np.testing.assert_allclose(metrics["self_cosine"], cosine, rtol=1e-4)
    np.testing.assert_allclose(metrics["other_pairs"], pairs, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], -cosine + 0.5 * pairs, rtol=1e-4)


def test_a_teacher_has_no_gradient_and_no_moment_and_stays_as_it_is_through_an_update():
    stage = dataclasses.replace(STAGE, teacher_dtype="bfloat16")
    params, grads, _ = step(stage)
    held, by_held = params["training"]["teachers"], grads["training"]["teachers"]
    assert {x.dtype for x in jax.tree.leaves(held)} == {np.dtype(jnp.bfloat16)}
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(by_held))
    tx = optim.create(optim.Config(), lambda _: jnp.asarray(0.1), stage.trainable)
    state = tx.init(params)
    moments = sum(x.size for x in jax.tree.leaves(state))
    student = sum(x.size for name, part in params.items() if name != "training" for x in jax.tree.leaves(part))
    assert moments < 2 * student + 10
    updates, _ = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after["training"]["teachers"], held)
    assert np.abs(after["blocks"]["mlp"]["up"]["kernel"] - params["blocks"]["mlp"]["up"]["kernel"]).max() > 1e-4


def test_micro_batches_give_the_same_gradients():
    stage = dataclasses.replace(STAGE, mask_ratio=0.0)
    _, want, metrics = step(stage)
    _, got, parted = step(dataclasses.replace(stage, microbatches=4))
    np.testing.assert_allclose(parted["loss"], metrics["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_paths_are_dropped_in_the_student_alone():
    stage = dataclasses.replace(STAGE, arch=dataclasses.replace(STUDENT, drop_path=0.4), mask_ratio=0.0)
    assert stage.teachers[0][1].config(stage.arch).drop_path == 0
    graphdef, params = parts(stage)
    loss = jax.jit(lambda params, batch, key: stage._loss(nnx.merge(graphdef, params), batch, key)[0])
    first, second = (float(loss(params, batch(), jax.random.key(i))) for i in range(2))
    assert first != second


@functools.cache
def core():
    config = zoo.architecture({"vision": dataclasses.asdict(CORE), "text": {
        "context_length": 7, "width": 24, "depth": 1, "heads": 4, "mlp_width": 40, "output_width": 20, "vocab_size": 56,
    }})  # fmt: skip
    return config, drawn(lambda: zoo.build(config, nnx.Rngs(0)), seed=3)[1]


def test_the_student_and_its_first_teacher_start_as_the_tower_that_is_given():
    stage = dataclasses.replace(STAGE, teachers={"self": SELF}, keep_function=True)
    graphdef, fresh = parts(stage)
    model = nnx.merge(graphdef, stage.start(fresh, {"student": core()}))
    given = nnx.merge(split(zoo.abstract(core()[0]))[0], core()[1]).vision
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1)
    want = given.features(images, (2, 3), class_token=False)
    np.testing.assert_allclose(model.features(images, class_token=False)[-1], want[3], rtol=1e-3, atol=1e-4)
    taught = stage.teachers[0][1].features(model.training.teachers.self, images, (4, 4), None)
    np.testing.assert_allclose(taught, want[2], rtol=1e-4, atol=1e-5)


def test_layer_scale_stays_as_it_was_made_and_positions_are_read_on_the_students_own_grid():
    stage = dataclasses.replace(STAGE, arch=dataclasses.replace(STUDENT, image_size=48))
    _, fresh = parts(stage)
    started = stage.start(fresh, {"student": core()})
    np.testing.assert_array_equal(started["blocks"]["scale1"]["gamma"], fresh["blocks"]["scale1"]["gamma"])
    given = nnx.merge(split(zoo.abstract(core()[0]))[0], core()[1]).vision
    np.testing.assert_allclose(started["position"], given._positions(6, 6), rtol=1e-6)
    np.testing.assert_array_equal(started["training"]["teachers"]["other"]["position"],
                                  fresh["training"]["teachers"]["other"]["position"])  # fmt: skip


def test_a_teacher_of_its_own_takes_the_weights_given_under_its_name():
    _, given = drawn(lambda: VisionTower(OTHER, rngs=nnx.Rngs(0)), seed=9)
    _, fresh = parts(STAGE)
    started = STAGE.start(fresh, {"other": (OTHER, given)})
    np.testing.assert_array_equal(started["training"]["teachers"]["other"]["position"], given["position"])
    np.testing.assert_array_equal(started["position"], fresh["position"])


def test_a_tower_of_another_make_is_refused_by_what_differs():
    _, fresh = parts(STAGE)
    with pytest.raises(ValueError, match="'student' are of another tower: it has patch_size 4, want 8; width 24"):
        STAGE.start(fresh, {"student": (OTHER, {})})


def test_a_student_of_another_width_is_mapped_to_the_teacher_and_leaves_the_map_behind(tmp_path):
    stage = Spatial(STUDENT, {"giant": PAIRS | {"direct": 1.0}}, teacher_dtype="float32")
    params, grads, metrics = step(stage)
    assert params["training"]["maps"]["giant"]["kernel"].shape == (32, 24)
    assert stage.trainable("training/maps/giant/kernel") and not stage.trainable("training/teachers/giant/position")
    assert np.linalg.norm(grads["training"]["maps"]["giant"]["kernel"]) > 1e-4
    assert {"giant_cosine", "giant_pairs"} <= set(metrics)
    checkpoint.save_weights(tmp_path / "weights", params, {"architecture": zoo.to_dict(STUDENT)})
    model = pe_jax.load(str(tmp_path / "weights"))
    assert not hasattr(model, checkpoint.TRAINING_ONLY)
    np.testing.assert_array_equal(model.position[...], params["position"])


def test_what_a_teacher_said_before_teaches_as_it_does_itself():
    params, _, metrics = whole()
    graphdef, _ = parts(STAGE)
    model = nnx.merge(graphdef, params)
    images = jnp.asarray(batch()["image"], jnp.float32) / 127.5 - 1
    said = STAGE.teachers[1][1].features(model.training.teachers.other, images, GRID, None)
    stage = Spatial(STUDENT, {"self": SELF, "other": STORED}, teacher_dtype="float32", pairs_chunk=7)
    assert stage.inputs == ("images", {"teacher": (24, 24)}) and STAGE.inputs == ("images", {})
    held = params["training"]["teachers"]
    (graphdef, _), own = parts(stage), params | {"training": {"teachers": {"self": held["self"]}}}
    data = {"image": jnp.asarray(batch()["image"]), "teacher": teachers.quantised(said)}
    assert data["teacher"].dtype == jnp.int8 and np.abs(data["teacher"]).max() == 127
    loss = jax.jit(lambda params, data: stage._loss(nnx.merge(graphdef, params), data, jax.random.key(2))[1])
    again = loss(own, data)
    np.testing.assert_allclose(again["other_pairs"], metrics["other_pairs"], rtol=0.01)
    with pytest.raises(ValueError, match="the batch has no teacher, and the student has 4 x 6 tokens"):
        loss(own, {"image": data["image"]})


def test_masks_of_sam_teach_places_and_cost_what_they_are_counted_at():
    arch = {
        "width": 8, "depths": (1, 1, 1, 1), "heads": 1, "windows": (2, 2, 2, 2), "global_blocks": (),
        "position_grid": 4, "image_size": 64, "decoder_width": 16, "decoder_heads": 2, "decoder_mlp_width": 32,
        "mask_width": 4,
    }  # fmt: skip
    sam = {"name": "sam2", "arch": arch, "points_per_side": 3, "chunk": 3, "pairs": 1.0}
    stage = Spatial(STUDENT, {"sam": sam})
    assert stage.parts == {"student": "model", "sam": zoo.sam2(arch)}
    teacher = stage.teachers[0][1]
    graphdef, params = drawn(lambda: teacher.build(STUDENT, "float32", nnx.Rngs(0)))

    @jax.jit
    def both(params, pixels):
        model = nnx.merge(graphdef, params)
        images = pixels.astype(jnp.float32) / 127.5 - 1
        return teacher.features(model, images, GRID, None), model.grid_features(model.prepare(pixels), GRID, 3, 3)

    said, want = both(params, batch()["image"][:2])
    assert said.shape == (2, 24, 9) and np.ptp(said) > 0
    np.testing.assert_allclose(said, want, rtol=1e-3, atol=1e-4)
    assert stage.update_flops(batch()) > 3 * 8 * zoo.forward_flops(STUDENT, (32, 48))


def test_a_traced_programs_matrix_products_are_counted_with_its_loops_in_full():
    def program(x, w):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, length=5)[0] @ w

    shapes = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert teachers._products(jax.make_jaxpr(program)(*shapes).jaxpr) == 6 * 2 * 3 * 4 * 4


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "all three"])
def test_loss_and_gradients_on_a_mesh_equal_those_on_one_device(shape):
    params, grads, metrics = whole()
    graphdef, _ = parts(STAGE)
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(nnx.eval_shape(lambda: STAGE.build(nnx.Rngs(0))), mesh)

    def run(params, batch):
        return STAGE.gradients(nnx.merge(graphdef, params), batch, jax.random.key(2))

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        got, got_metrics = jax.jit(run, out_shardings=(shardings, None))(placed, sharding.global_batch(batch(), mesh))
    for name in metrics:
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(grads), strict=True):
        error = np.linalg.norm(np.asarray(a) - b) / max(np.linalg.norm(b), 1e-6)
        assert error < 1e-4, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": CORE}, "take a PE-Spatial architecture"),
        ({"teachers": {}}, "needs teachers"),
        ({"teachers": {"student": SELF}}, "cannot be called 'student'"),
        ({"teachers": {"self": SELF | {"layer": 4}}}, "layer 4 does not exist"),
        ({"teachers": {"self": SELF | {"layer": 0}}}, "layer 0 is the patch embedding"),
        ({"teachers": {"self": {"name": "tower"}}}, "give at least one of them a number above 0"),
        ({"teachers": {"self": {"name": "towr", "direct": 1.0}}}, "'towr' is unknown"),
        ({"teachers": {"self": SELF | {"pair": 1.0}}}, "has no field 'pair'; did you mean pairs"),
        ({"teachers": dict.fromkeys("ab", STORED)}, "keep one of those called stored"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 must be in \[0, 1\)"),
        ({"mask_block": 0}, "must be at least 1"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **fields)


def test_patches_that_do_not_cut_into_squares_are_refused():
    with pytest.raises(ValueError, match="4 x 6 patches do not cut into squares of mask_block=4"):
        dataclasses.replace(STAGE, mask_block=4).hidden(jax.random.key(0), 2, GRID)


def test_an_update_costs_three_passes_of_the_student_and_one_of_each_teacher_as_it_is_cut():
    first = dataclasses.replace(STUDENT, depth=2)
    want = 8 * sum(
        times * zoo.forward_flops(config, (32, 48)) for times, config in ((3, STUDENT), (1, first), (1, OTHER))
    )
    assert STAGE.update_flops(batch()) == want


def losses_of(workdir):
    with open(workdir / "losses.csv") as file:
        return [(row["batch"], float(row["loss"])) for row in csv.DictReader(file)]


@pytest.mark.full
def test_a_run_that_lost_its_last_steps_repeats_their_losses_on_another_mesh(tmp_path):
    config, params = core()
    checkpoint.save_weights(tmp_path / "core", params, {"architecture": zoo.to_dict(config)})
    arch = dataclasses.asdict(dataclasses.replace(STUDENT, drop_path=0.2))
    run = {
        "stage": {"name": "spatial", "arch": arch, "teachers": {"self": SELF}, "microbatches": 2},
        "init": {"student": str(tmp_path / "core")},
        "batch_size": 8,
        "phases": [{"image_size": 32, "examples": 32}],
        "mesh": {"data": 4, "tensor": 2},
        "data": {"sources": [{"name": "synthetic"}], "augment": {"aspect": [0.75, 1.33]}, "threads": 1},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "log_every_steps": 1,
    }
    assert train.train(run, tmp_path / "run") == 0
    first = losses_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert train.train(run | {"mesh": {"fsdp": 4, "data": 2}}, tmp_path / "run") == 0
    again = losses_of(tmp_path / "run")
    assert [records for records, _ in again] == [records for records, _ in first] and len(first) == 4
    np.testing.assert_allclose([x for _, x in again], [x for _, x in first], rtol=1e-3)  # the teacher is in bfloat16
    model = pe_jax.load(str(tmp_path / "run"))
    assert not hasattr(model, checkpoint.TRAINING_ONLY) and model.config.layer_scale == 0.1


@pytest.mark.parametrize("arg", ["G14", "G14,teacher=cached", "L14"])
def test_the_published_runs_hold_their_teachers_cut_in_half_precision_and_without_moments(arg):
    run = train.parse(align_spatial.get_config(arg).to_dict())
    assert run.phases[0].batch_size == 12_288 and run.steps == 24_000
    tx, rate = train.optimizer_of(run)
    assert rate(0) == pytest.approx(5e-4)  # no warm-up
    state = train.abstract_state(run.stage, tx, sharding.make_mesh({"data": -1, "fsdp": 2}))
    name, depth = ("giant", 50) if arg == "L14" else ("self", 41)
    kernel = state.params["training"]["teachers"][name]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (depth, 1536, 8960) and kernel.dtype == jnp.bfloat16 and "fsdp" in str(kernel.sharding.spec)
    assert ("sam" in state.params["training"]["teachers"]) == (arg == "G14")
    moving = state.params | {"training": state.params["training"].get("maps", {})}
    assert 0 <= zoo.count(state.opt_state) - 2 * zoo.count(moving) < 10  # both moments of what moves, and counters
    specs = train.batch_spec(run, run.phases[0])
    assert ("teacher" in specs) == (arg == "G14,teacher=cached")
    if arg != "G14":  # whose SAM takes long to trace
        assert run.stage.update_flops(specs) > 3 * 12_288 * zoo.forward_flops(run.stage.arch, run.image_size)


@pytest.mark.parametrize("arg", ["H14", "L14,teacher=sam", "G14,giant=x", "G14,teacher=dino"])
def test_what_is_no_experiment_is_refused(arg):
    with pytest.raises(ValueError, match="takes one of T16, S16, B16, L14, G14"):
        align_spatial.get_config(arg)
