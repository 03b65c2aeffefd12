"""The losses between tokens and a teacher's: their formulas, and that no table of all pairs is ever held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_jax import losses, sharding


def tokens(images=3, places=22, width=12, teacher_width=7, dtype=jnp.float32):
    rng = np.random.default_rng(3)
    student = rng.standard_normal((images, places, width))
    # Neighbours of the teacher are alike, so that the temperature has something to tell apart.
    teacher = np.cumsum(rng.standard_normal((images, places, teacher_width)), 1)
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


def directions(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain_pairs(student, teacher, temperature=None):
    """The formula with both tables whole."""
    y, x = (jnp.einsum("bid,bjd->bij", t, t, precision="highest") for t in map(unit, (student, teacher)))
    return jnp.mean((y - (x if temperature is None else jnp.exp(temperature * (x - 1)))) ** 2, (1, 2))


def value_and_gradient(loss, *inputs):
    """Of a sum in which each image has a weight of its own, so that images mixed up would show."""

    def weighted(student, *rest):
        values = loss(student, *rest)
        return jnp.vdot(jnp.arange(1.0, len(values) + 1), values), values

    (_, values), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(*inputs)
    return values, gradient


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def close(got, want, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b) < rtol


def test_direct_distillation_is_minus_the_mean_cosine_over_every_token():
    student, teacher = tokens(teacher_width=12)
    want = -np.sum(directions(np.float64(student)) * directions(np.float64(teacher)), -1).mean(1)
    np.testing.assert_allclose(losses.token_cosine(student, teacher), want, rtol=1e-5)
    np.testing.assert_allclose(losses.token_cosine(student, 3 * student), -1, rtol=1e-6)
    np.testing.assert_allclose(losses.token_cosine(student, -student), 1, rtol=1e-6)


def test_following_the_gradient_of_direct_distillation_turns_tokens_to_the_teacher():
    student, teacher = tokens(teacher_width=12)
    step = student - 3 * value_and_gradient(losses.token_cosine, student, teacher)[1]

    def cosine(x):
        return np.sum(directions(np.asarray(x)) * directions(np.asarray(teacher)), -1).mean()

    assert cosine(step) > cosine(student)


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 20.0), (5, 20.0), (5, None), (64, 20.0)])
def test_the_pairs_in_chunks_are_the_plain_formula_in_value_and_gradient(chunk, temperature):
    student, teacher = tokens()
    want = value_and_gradient(functools.partial(plain_pairs, temperature=temperature), student, teacher)
    loss = functools.partial(losses.token_pairs, temperature=temperature, chunk=chunk)
    close(value_and_gradient(loss, student, teacher), want)
    close(jax.jit(loss)(student, teacher), want[0])


def test_a_pair_the_teacher_sees_at_right_angles_is_wished_to_be_apart_as_the_temperature_says():
    # Two tokens alike for the student, at 60 degrees for the teacher: (1 - exp(t (1/2 - 1)))² off the diagonal.
    student = jnp.ones((1, 2, 3))
    teacher = jnp.asarray([[[1.0, 0.0], [0.5, 0.75**0.5]]])
    for temperature in (20.0, 1.0):
        want = (1 - np.exp(-temperature / 2)) ** 2 / 2
        np.testing.assert_allclose(losses.token_pairs(student, teacher, temperature=temperature), want, rtol=1e-6)
    np.testing.assert_allclose(losses.token_pairs(student, teacher), 0.25 / 2, rtol=1e-5)


def test_the_pairs_are_zero_for_a_teacher_turned_and_stretched_as_a_whole():
    student, _ = tokens()
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((12, 12)))
    lengths = np.random.default_rng(5).uniform(0.5, 2, (3, 22, 1))
    turned = jnp.asarray(lengths * np.asarray(student) @ turn, jnp.float32)
    assert losses.token_pairs(student, turned).max() < 1e-10
    assert losses.token_pairs(student, jnp.flip(turned, 1)).min() > 1e-2


def test_no_gradient_reaches_a_teacher():
    student, teacher = tokens(teacher_width=12)
    for loss in (losses.token_cosine, losses.token_pairs):
        gradients = jax.grad(lambda *x, loss=loss: jnp.sum(loss(*x)), (0, 1))(student, teacher)
        assert np.any(gradients[0]) and not np.any(gradients[1])


def shapes_in(jaxpr):
    """Of every array that a program makes, in its loops too."""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            yield out.aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def test_never_more_than_a_chunk_of_an_images_pairs_is_held():
    student, teacher = tokens()

    def largest(chunk):
        loss = functools.partial(losses.token_pairs, temperature=20.0, chunk=chunk)
        program = jax.make_jaxpr(jax.value_and_grad(lambda *x: jnp.sum(loss(*x))))(student, teacher)
        shapes = shapes_in(program.jaxpr)
        return max((shape[-2] for shape in shapes if len(shape) > 1 and shape[-1] == 22), default=0)

    assert largest(4) == 4
    assert largest(22) == 22  # so that the look itself would have found it


def test_bfloat16_tokens_give_the_loss_to_their_own_precision():
    student, teacher = tokens(dtype=jnp.bfloat16)
    got = value_and_gradient(functools.partial(losses.token_pairs, temperature=20.0), student, teacher)
    plain = functools.partial(plain_pairs, temperature=20.0)
    want = value_and_gradient(plain, student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert got[1].dtype == jnp.bfloat16
    close(jax.tree.map(jnp.float32, got), want, rtol=0.02)


def test_a_zero_token_has_no_direction_and_breaks_nothing():
    student, teacher = tokens(teacher_width=12)
    student = student.at[0, 4].set(0)
    for loss in (losses.token_cosine, losses.token_pairs):
        value, gradient = value_and_gradient(loss, student, teacher)
        assert np.isfinite(value).all() and np.isfinite(gradient).all()


def test_the_pairs_on_a_mesh_are_those_on_one_device():
    student, teacher = tokens(images=8)
    loss = functools.partial(losses.token_pairs, temperature=20.0, chunk=8)
    want = value_and_gradient(loss, student, teacher)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        cut = jax.device_put((student, teacher), sharding.batch_sharding(mesh))
        close(value_and_gradient(loss, *cut), want)


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (losses.token_cosine, ((2, 4, 3), (2, 4, 5)), "must both be"),
        (losses.token_pairs, ((2, 4, 3), (2, 5, 3)), "must agree in"),
        (functools.partial(losses.token_pairs, chunk=0), ((2, 4, 3), (2, 4, 5)), "chunk=0 must be at least 1"),
        (functools.partial(losses.token_pairs, temperature=0.0), ((2, 4, 3), (2, 4, 5)), "temperature=0.0 must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(loss, shapes, message):
    with pytest.raises(ValueError, match=message):
        loss(*map(jnp.ones, shapes))
