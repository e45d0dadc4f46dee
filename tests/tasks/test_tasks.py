from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors import safe_open

from looped_fast.tasks import (
    EVALUATION,
    TASKS,
    DecisionTree,
    FixedPrompts,
    LinearRegression,
    Relu2LayerNetwork,
    batch_generator,
    make_task,
    sample_batch,
    task_options,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers.safetensors"
ALL = pytest.mark.parametrize("name", list(TASKS))
D = 6


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        case = json.loads(file.metadata()["case"])
        return case, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sample(name, B=32, n=12, *, d=D, seed=0, step=0, **other):
    return sample_batch(make_task(name, d), B, n, seed=seed, step=step, **other)


def draw(task, B, n=1, seed=0):
    return task.draw(B, n, torch.Generator().manual_seed(seed))


def assert_mean(values, expected, spread=None, sigmas=5):
    """Assert the mean of independent values to five standard errors: fails once in 10^6."""
    values = values.double()
    spread = values.std().item() if spread is None else spread
    error = abs(values.mean().item() - expected)
    assert error <= sigmas * spread / math.sqrt(values.numel()), error


def test_trees_evaluate_as_the_official_ones(golden):
    case, t = golden
    inner = 2 ** case["depth"] - 1  # the official arrays span inner nodes and leaves
    ys = DecisionTree.evaluate(
        t["dt/xs"],
        coordinates=t["dt/coordinates"][:, :inner],
        leaf_values=t["dt/leaf_values"][:, inner:],
    )
    assert torch.equal(ys, t["dt/ys"])


def test_networks_evaluate_as_the_official_ones(golden):
    _, t = golden
    ys = Relu2LayerNetwork.evaluate(t["relu2nn/xs"], W1=t["relu2nn/W1"], W2=t["relu2nn/W2"])
    assert torch.equal(ys, t["relu2nn/ys"])


def test_linear_functions_evaluate_as_the_official_ones(golden):
    case, t = golden
    assert (t["sparse/w"] != 0).sum(1).eq(case["sparsity"]).all()
    assert torch.equal(LinearRegression.evaluate(t["sparse/xs"], w=t["sparse/w"]), t["sparse/ys"])


def test_trees_equal_a_walk_node_by_node():
    task = DecisionTree(n_dims=4, depth=3)
    function = draw(task, 5)
    xs = torch.randn(5, 20, 4)
    ys = task.evaluate(xs, **function)
    for b in range(5):
        for i in range(20):
            node = 0
            for _ in range(3):
                coordinate = function["coordinates"][b, node]
                node = 2 * node + 1 + int(xs[b, i, coordinate] > 0)
            assert ys[b, i] == function["leaf_values"][b, node - 7]


def test_a_coordinate_of_zero_goes_left():
    leaves = torch.tensor([[1.0, 2.0]])
    coordinates = torch.zeros(1, 1, dtype=torch.int64)
    xs = torch.tensor([[[0.0], [-0.0], [1e-30], [-1.0]]])
    ys = DecisionTree.evaluate(xs, coordinates=coordinates, leaf_values=leaves)
    assert ys.tolist() == [[1.0, 1.0, 2.0, 1.0]]


@pytest.mark.parametrize(("n_leaves", "n_inner"), [(6, 5), (8, 8), (8, 6), (1, 0), (0, 0)])
def test_a_tree_that_is_not_complete_is_refused(n_leaves, n_inner):
    """Evaluating it would read past its end, or skip some of its leaves."""
    with pytest.raises(ValueError, match=rf"width {n_leaves} .* width {n_inner} .* give 2\^depth"):
        DecisionTree.evaluate(
            torch.randn(2, 3, 4),
            coordinates=torch.zeros(2, n_inner, dtype=torch.int64),
            leaf_values=torch.randn(2, n_leaves),
        )


@ALL
def test_points_are_standard_normal(name):
    xs, ys = sample(name, B=1000)
    assert xs.dtype == ys.dtype == torch.float32
    assert (xs.shape, ys.shape) == ((1000, 12, D), (1000, 12))
    assert_mean(xs, 0)
    assert_mean(xs.square(), 1)
    assert_mean(xs.pow(4), 3)
    assert_mean(xs[..., 0] * xs[..., 1], 0)
    assert_mean(xs[:, 0] * xs[:, 1], 0)
    assert_mean(xs[:-1] * xs[1:], 0)


@ALL
def test_y_has_the_variance_that_the_task_states(name):
    _, ys = sample(name, B=8000, n=1)
    assert_mean(ys, 0)
    assert_mean(ys.square(), make_task(name, D).variance)


@ALL
def test_every_prompt_has_a_function_of_its_own(name):
    function = draw(make_task(name, D), 64)
    function.pop("from_first", None)  # of a mixture
    for tensor in function.values():
        assert len(tensor.flatten(1).unique(dim=0)) == 64


def test_linear_weights_are_standard_normal():
    w = draw(make_task("lr", D), 4000)["w"]
    assert w.shape == (4000, D, 1)
    assert_mean(w, 0)
    assert_mean(w.square(), 1)
    assert_mean(w[:, 0] * w[:, 1], 0)


def test_noise_has_its_standard_deviation_and_the_signal_is_linear():
    task = make_task("noisy_lr", D, noise_std=0.3)
    function = draw(task, 500, n=8)
    xs = torch.randn(500, 8, D)
    noise = task.evaluate(xs, **function) - LinearRegression.evaluate(xs, w=function["w"])
    assert_mean(noise, 0)
    assert_mean(noise.square(), 0.09)
    assert_mean(noise[:, 0] * noise[:, 1], 0)
    assert make_task("noisy_lr", D).noise_std == 0.1


@pytest.mark.parametrize("sparsity", [1, 3, 6])
def test_sparse_weights_use_uniformly_chosen_coordinates(sparsity):
    w = draw(make_task("sparse_lr", D, sparsity=sparsity), 6000)["w"][..., 0]
    used = w != 0
    assert used.sum(1).eq(sparsity).all()
    for coordinate in range(D):
        assert_mean(used[:, coordinate], sparsity / D, spread=0.5)
    # Pairs too: a choice of neighbours would have uniform coordinates as well.
    both = sparsity * (sparsity - 1) / (D * (D - 1))
    assert_mean(used[:, 0] & used[:, 1], both, spread=0.5)
    assert_mean(used[:, 0] & used[:, 3], both, spread=0.5)
    assert_mean(w[used], 0)
    assert_mean(w[used].square(), 1)


def test_trees_ask_uniform_coordinates_and_use_every_leaf():
    task = make_task("dt", D)
    function = draw(task, 3000)
    assert function["coordinates"].shape == (3000, 15)
    assert function["leaf_values"].shape == (3000, 16)
    for coordinate in range(D):
        assert_mean(function["coordinates"] == coordinate, 1 / D)
    assert_mean(function["leaf_values"], 0)
    assert_mean(function["leaf_values"].square(), 1)
    numbers = torch.arange(16.0).expand(3000, 16)
    distinct = torch.arange(15).expand(3000, 15)  # no coordinate twice: leaves equally likely
    reached = task.evaluate(torch.randn(3000, 1, 15), coordinates=distinct, leaf_values=numbers)
    for leaf in range(16):
        assert_mean(reached == leaf, 1 / 16)


def test_networks_have_standard_normal_weights():
    function = draw(make_task("relu_2nn", D, hidden=50), 100)
    assert function["W1"].shape == (100, D, 50)
    assert function["W2"].shape == (100, 50, 1)
    for weights in function.values():
        assert_mean(weights, 0)
        assert_mean(weights.square(), 1)
    assert make_task("relu_2nn", D).hidden == 100


@ALL
def test_a_batch_is_a_pure_function_of_seed_step_and_rank(name):
    xs, ys = sample(name, seed=1, step=2, rank=3)
    torch.rand(7)
    again = sample(name, seed=1, step=2, rank=3)
    assert torch.equal(again.xs, xs)
    assert torch.equal(again.ys, ys)
    for other in (
        {"seed": 2, "step": 2, "rank": 3},
        {"seed": 1, "step": 3, "rank": 3},
        {"seed": 1, "step": 2, "rank": 2},
        {"seed": 1, "step": 2, "rank": EVALUATION},
        {"seed": 2, "step": 1, "rank": 3},
    ):
        different = sample(name, **other)
        assert not torch.isclose(different.xs, xs).all(-1).any(), other


@ALL
def test_sampling_leaves_the_global_generator_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(name)
    FixedPrompts(make_task(name, D), 8, 5, 4, seed=0).batch(5, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(sample(name).xs, first.xs)


@pytest.mark.parametrize("rank", [0, 7, EVALUATION])
def test_no_two_steps_share_a_32_bit_seed(rank):
    """PyTorch's CPU generator keeps only the low 32 bits of its seed."""
    n_steps = 20_000
    low = {
        batch_generator(42, step, rank, "cpu").initial_seed() & 0xFFFFFFFF
        for step in range(100_000, 100_000 + n_steps)
    }
    assert len(low) == n_steps


@ALL
def test_the_curriculum_zeroes_trailing_coordinates_where_a_task_truncates(name):
    full = sample(name)
    cut = sample(name, n_dims=2)
    assert make_task(name, D).truncates == (name not in ("dt", "fourier", "mixture"))
    if name in ("dt", "fourier", "mixture"):
        assert torch.equal(cut.xs, full.xs)
        assert torch.equal(cut.ys, full.ys)
    else:
        assert torch.equal(cut.xs[..., :2], full.xs[..., :2])
        assert not cut.xs[..., 2:].any()
        assert not torch.isclose(cut.ys, full.ys).all()


@pytest.mark.parametrize("name", ["lr", "noisy_lr", "sparse_lr", "relu_2nn", "quadratic"])
def test_y_is_the_function_of_the_truncated_x(name):
    task = make_task(name, D)
    generator = batch_generator(0, 0, 0, "cpu")
    xs = torch.randn(32, 12, D, generator=generator)
    function = task.draw(32, 12, generator)
    xs[..., 2:] = 0
    cut = sample(name, n_dims=2)
    assert torch.equal(cut.xs, xs)
    assert torch.equal(cut.ys, task.evaluate(xs, **function))


def test_truncated_linear_regression_has_the_variance_of_the_active_dimensions():
    _, ys = sample("lr", B=8000, n=1, n_dims=2)
    assert_mean(ys.square(), 2)


@ALL
def test_as_many_dimensions_as_there_are_truncate_nothing(name):
    assert torch.equal(sample(name, n_dims=D).ys, sample(name).ys)


@pytest.mark.parametrize("n_dims", [0, D + 1])
def test_active_dimensions_out_of_range_are_refused(n_dims):
    with pytest.raises(ValueError, match=rf"n_dims = {n_dims} is outside 1\.\.{D}"):
        sample("lr", n_dims=n_dims)


@ALL
def test_a_function_has_the_same_values_at_a_prefix_of_the_points(name):
    task = make_task(name, D)
    function = draw(task, 8, n=12)
    xs = torch.randn(8, 12, D)
    short = task.evaluate(xs[:, :5], **function)
    assert relative_error(short, task.evaluate(xs, **function)[:, :5]) < 1e-6


def fixed(name="lr", n_prompts=10, batch_size=4, world_size=1, n_points=6, seed=0):
    task = make_task(name, D)
    return FixedPrompts(task, n_prompts, n_points, batch_size, seed=seed, world_size=world_size)


def epoch(prompts, number, steps, world_size=1):
    """First coordinates, which identify them, of the prompts that an epoch visits."""
    visited = []
    for step in range(number * steps, (number + 1) * steps):
        for rank in range(world_size):
            visited += prompts.batch(2, step=step, rank=rank).xs[:, 0, 0].tolist()
    return visited


@ALL
def test_an_epoch_visits_every_fixed_prompt_once(name):
    prompts = fixed(name, n_prompts=12)
    first, second = epoch(prompts, 0, 3), epoch(prompts, 1, 3)
    assert len(set(first)) == 12
    assert set(first) == set(second)
    assert first != second


def test_the_remainder_that_sits_out_changes_with_the_epoch():
    prompts = fixed(n_prompts=10)
    epochs = [epoch(prompts, i, 2) for i in range(8)]
    assert all(len(set(visited)) == 8 for visited in epochs)
    assert len(set().union(*epochs)) == 10
    assert len({frozenset(visited) for visited in epochs}) > 1


def test_ranks_share_an_epoch_without_overlap():
    prompts = fixed(n_prompts=24, batch_size=4, world_size=3)
    assert len(set(epoch(prompts, 0, 2, world_size=3))) == 24


@ALL
def test_a_fixed_prompt_keeps_its_function(name):
    prompts = fixed(name, n_prompts=4)
    pairs = []
    for step in range(5):
        xs, ys = prompts.batch(6, step=step)
        order = xs[:, 0, 0].argsort()
        pairs.append((xs[order], ys[order]))
    for xs, ys in pairs[1:]:
        assert torch.equal(xs, pairs[0][0])
        assert relative_error(ys, pairs[0][1]) < 1e-6


def test_fixed_batches_are_a_pure_function_of_seed_and_step():
    one, other = fixed(n_prompts=50), fixed(n_prompts=50)
    other.batch(6, step=3)
    assert torch.equal(one.batch(6, step=17).ys, other.batch(6, step=17).ys)
    assert not torch.isclose(fixed(n_prompts=50, seed=1).batch(6, step=17).xs, one._xs[:4]).all()


def test_the_curriculum_applies_to_fixed_prompts():
    prompts = fixed(n_prompts=4)
    full, cut = prompts.batch(6, step=0), prompts.batch(3, step=0, n_dims=2)
    assert torch.equal(cut.xs[..., :2], full.xs[:, :3, :2])
    assert not cut.xs[..., 2:].any()
    assert cut.ys.shape == (4, 3)


def test_fewer_prompts_than_a_step_uses_are_refused():
    with pytest.raises(ValueError, match=r"11 training prompts are fewer .* \(12\); lower batch"):
        fixed(n_prompts=11, batch_size=4, world_size=3)


def test_more_points_than_fixed_prompts_hold_are_refused():
    with pytest.raises(ValueError, match="7"):
        fixed(n_points=6).batch(7, step=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lr", []),
        ("noisy_lr", ["noise_std"]),
        ("sparse_lr", ["sparsity"]),
        ("dt", ["depth"]),
        ("relu_2nn", ["hidden"]),
        ("quadratic", []),
        ("classification", []),
        ("fourier", ["frequencies", "period"]),
        ("mixture", ["first", "second", "share", "first_options", "second_options"]),
    ],
)
def test_a_task_lists_its_options(name, options):
    assert task_options(name) == options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lrr", {}, "unknown task 'lrr'; did you mean 'lr'"),
        ("dt", {"dept": 3}, "unknown option of task 'dt' 'dept'; did you mean 'depth'"),
        ("lr", {"depth": 3}, "task 'lr' has no option 'depth', nor any other"),
        ("dt", {"depth": 0}, "depth = 0: at least 1"),
        ("sparse_lr", {"sparsity": 7}, "sparsity = 7 exceeds n_dims = 6; lower sparsity"),
        ("sparse_lr", {"sparsity": 0}, "sparsity = 0: at least 1"),
        ("relu_2nn", {"hidden": -1}, "hidden = -1: at least 1"),
        ("noisy_lr", {"noise_std": -0.1}, "noise_std = -0.1: at least 0"),
        ("dt", {"depth": 2.5}, "task.depth = 2.5: int is needed"),
        ("dt", {"depth": True}, "task.depth = True: int is needed"),
        ("noisy_lr", {"noise_std": "much"}, "task.noise_std = 'much': float is needed"),
        ("fourier", {"frequencies": 0}, "frequencies = 0: at least 1"),
        ("fourier", {"period": 0.0}, "period = 0.0: a finite number above 0"),
        ("mixture", {"share": 1.5}, "share = 1.5: a number from 0 to 1"),
        ("mixture", {"first": "lrr"}, "first = 'lrr': unknown task 'lrr'; did you mean 'lr'"),
        ("mixture", {"second_options": {"dept": 3}}, "second = 'dt': .* did you mean 'depth'"),
        ("mixture", {"second_options": {"depth": 0}}, "second = 'dt': depth = 0: at least 1"),
    ],
)
def test_a_bad_task_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, D, **options)


def test_a_task_needs_a_dimension():
    with pytest.raises(ValueError, match="n_dims = 0: at least 1"):
        make_task("lr", 0)
