"""The losses of spatial alignment against the appendix's formulas written down plainly in torch, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from pe_jax import losses


def inputs():
    rng = np.random.default_rng(7)
    student, teacher = rng.standard_normal((2, 3, 20, 12))
    logits = np.cumsum(rng.standard_normal((3, 20, 9)), 1)  # neighbours alike, as masks are
    return student.astype(np.float32), teacher.astype(np.float32), logits.astype(np.float32)


def in_torch(student, teacher, logits):
    s50, t41, masks = (torch.tensor(x, dtype=torch.float64) for x in (student, teacher, logits))
    s50.requires_grad_()
    core = -F.cosine_similarity(s50, t41, dim=-1).mean()
    x = F.cosine_similarity(masks[:, :, None], masks[:, None], dim=-1)
    y = F.cosine_similarity(s50[:, :, None], s50[:, None], dim=-1)
    n = s50.shape[1]
    local = ((y - torch.exp(20 * (x - 1))) ** 2).sum((1, 2)).div(n**2).mean()
    gradients = [torch.autograd.grad(loss, s50, retain_graph=True)[0].numpy() for loss in (core, local)]
    return core.item(), local.item(), *gradients


def test_both_losses_and_their_gradients_equal_the_formulas_in_torch():
    student, teacher, logits = map(jnp.asarray, inputs())
    core, by_core = jax.value_and_grad(lambda x: jnp.mean(losses.token_cosine(x, teacher)))(student)
    local, by_local = jax.value_and_grad(lambda x: jnp.mean(losses.token_pairs(x, logits, temperature=20.0, chunk=6)))(
        student
    )
    for got, want in zip((core, local, by_core, by_local), in_torch(*inputs()), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4
