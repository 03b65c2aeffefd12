"""LAMB on stacked layers against timm's torch LAMB on each layer apart, 20 steps."""

import numpy as np
import timm.optim
import torch

from pe_jax import optim
from tests import test_optim as ours


def test_lamb_equals_timms_on_each_layer():
    params, gradients = ours.clip_params(0), [ours.clip_params(seed) for seed in range(1, 21)]
    schedule = optim.learning_rate(ours.CONFIG, [(12, 4), (8, 2)])
    got, _ = ours.run(optim.create(ours.CONFIG, schedule), params, gradients)

    c = ours.CONFIG
    leaves = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in ours.unstack(params).items()}
    decayed = [x for name, x in leaves.items() if name.split("[")[0] in ours.DECAYED]
    others = [x for name, x in leaves.items() if name.split("[")[0] not in ours.DECAYED]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    lamb = timm.optim.Lamb(groups, betas=(c.b1, c.b2), eps=c.eps, max_grad_norm=c.grad_clip)
    for step, gradient in enumerate(gradients):
        for name, value in ours.unstack(gradient).items():
            leaves[name].grad = torch.tensor(value)
        for group in lamb.param_groups:
            group["lr"] = float(schedule(step))
        lamb.step()
    for name, value in ours.unstack(got).items():
        np.testing.assert_allclose(value, leaves[name].detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
