"""The schedule of the Tiny Recursive Model, as the paper's pseudocode writes it.

Source: arXiv 2510.04871, figure 3. There x is the embedded puzzle, y the answer, and z a latent
state; the code calls the states z_H and z_L.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from looped_fast.ops.call import LoopSettings, LoopTensors, SharedWeights

# (injected [B, S, D], state [B, S, D], steps) -> the state after so many steps of the network
Net = Callable[[Tensor, Tensor, int], Tensor]


def latent_recursion(net: Net, x: Tensor, y: Tensor, z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Improve the latent state ``n`` times, then the answer once: (y, z). All [B, S, D]."""
    z = net(x + y, z, n)
    y = net(z, y, 1)
    return y, z


def deep_recursion(
    net: Net, x: Tensor, y: Tensor, z: Tensor, n: int, T: int
) -> tuple[Tensor, Tensor]:
    """Recurse ``T`` times, of which only the last carries gradient: (y, z). All [B, S, D]."""
    with torch.no_grad():
        for _ in range(T - 1):
            y, z = latent_recursion(net, x, y, z, n)
    if T > 1:
        y, z = y.detach(), z.detach()  # forward-mode derivatives pass through no_grad
    return latent_recursion(net, x, y, z, n)


def looped_net(
    run: Callable[[LoopTensors, LoopSettings], Tensor],
    positions: Tensor | None,
    weights: list[Tensor],
    settings: LoopSettings,
) -> Net:
    """The network as ``run``, which takes what ``op.run`` does and returns the same.

    All steps carry gradient where autograd is on; elsewhere only the last state is kept.
    """
    if not torch.compiler.is_compiling():
        weights = SharedWeights(weights)  # they stay what they are while the network is in use

    def net(injected: Tensor, state: Tensor, n_loops: int) -> Tensor:
        window = n_loops if torch.is_grad_enabled() else 1
        tensors = LoopTensors(injected, positions, state, weights, [])
        return run(tensors, settings._replace(n_loops=n_loops, window=window))[-1]

    return net
