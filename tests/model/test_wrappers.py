"""What PyTorch puts around a model: DDP, FSDP, activation checkpoints, averages, meta weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import small_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from looped_fast import LoopedTransformer, ModelConfig, explain_backend

CONFIG = ModelConfig(n_dims=4, n_positions=8, n_embd=32, n_head=4, n_loops=3, window=2)
PROMPT = (torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2, 8))


def build() -> LoopedTransformer:
    torch.manual_seed(0)
    return small_model(**CONFIG.to_dict())


def block_of(model):
    return model._backbone.transformer["h"]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def gradients(model, wrapped=None):
    predictions = (wrapped or model)(*PROMPT)
    predictions.square().mean().backward()
    return predictions, {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def assert_same(wrapped_result, fast=True):
    expected, expected_gradients = gradients(build())
    predictions, found = wrapped_result
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}
    if fast:
        assert torch.equal(predictions, expected)
    torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected_gradients, rtol=1e-4, atol=1e-6)


def is_fast(model):
    return explain_backend(model, 2, 8).chosen == explain_backend(build(), 2, 8).chosen


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel_runs_fast(settings):
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(model, **settings)
    assert_same(gradients(model, wrapped))
    assert is_fast(model)


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_models_run_fast():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(build(), mesh=init_device_mesh("cpu", (1,)))
    assert_same(gradients(model))


@pytest.mark.usefixtures("one_process")
def test_models_sharded_block_by_block_run_by_modules():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = build(), init_device_mesh("cpu", (1,))
    fully_shard(block_of(model)[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.warns(
        UserWarning, match=r"module by module .*: _backbone\.transformer\.h\.0 has a"
    ):
        result = gradients(model)
    assert_same(result, fast=False)


def test_a_checkpointed_block_runs_by_modules():
    model = build()
    block_of(model)[0] = checkpoint_wrapper(block_of(model)[0])
    with pytest.warns(UserWarning, match=r"h\.0 is a .*CheckpointWrapper"):
        result = gradients(model)
    assert_same(result, fast=False)


def test_averaged_models_run_fast():
    model = build()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update_parameters(model)
    expected = build()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(1)
    average.module.load_state_dict(model.state_dict())
    assert torch.equal(average(*PROMPT), expected(*PROMPT))
    assert is_fast(average.module)


def test_data_parallel_on_a_cpu_and_shared_memory_run_fast():
    model = build()
    assert torch.equal(nn.DataParallel(model.share_memory())(*PROMPT), build()(*PROMPT))
    assert is_fast(model)


def replicate(module):
    """Copy as nn.DataParallel does on GPUs: weights become plain attributes. Doubles them."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, weight in module._parameters.items():
        setattr(replica, name, 2 * weight.detach())
    return replica


def test_replicas_of_data_parallel_read_their_own_weights():
    model, doubled = build(), build()
    model(*PROMPT)
    replica = replicate(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
        assert torch.equal(replica(*PROMPT), doubled(*PROMPT))


def test_weights_made_on_meta_and_assigned_run_fast():
    with torch.device("meta"):
        model = LoopedTransformer(CONFIG)
    model.load_state_dict(build().state_dict(), assign=True)
    assert torch.equal(model(*PROMPT), build()(*PROMPT))
    assert is_fast(model)


def test_swapped_parameters_are_read_by_the_next_call():
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = model(*PROMPT)
    fc = block_of(model)[0].mlp.c_fc
    fc.weight = block_of(other)[0].mlp.c_fc.weight
    expected = build()
    with torch.no_grad():
        block_of(expected)[0].mlp.c_fc.weight.mul_(1.5)
    assert torch.equal(model(*PROMPT), expected(*PROMPT))
    assert not torch.equal(model(*PROMPT), before)
