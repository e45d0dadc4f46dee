"""TRM's block on the triton backend, through the public ops, with interpreted kernels."""

from __future__ import annotations

import pytest
import torch
from after_norm_cases import loop_inputs, run, settings_of
from conftest import CALL, FP32_EPS, NO_TRITON, changed, relative_error
from golden_cases import load_tensors, with_prefix

from looped_fast import ops
from looped_fast.ops import triton_backend
from looped_fast.ops.block import GPT2, TRM, Block

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import weight_gradients
from looped_fast.kernels.saved_activations import SavedActivations

# --- recorded runs of the public code


def recorded(name, backend, dtype, precision):
    """States, logits and gradients of the public model's step, made of loops of the one op."""
    case, tensors = load_tensors(name)
    given = with_prefix(tensors, "param/")
    params = {name: value.to(dtype).requires_grad_() for name, value in given.items()}
    embedded = torch.nn.functional.embedding(
        tensors["inputs"], params["embed_tokens.embedding_weight"]
    )
    if case["pos_encodings"] == "learned":
        embedded = 0.707106781 * (embedded + params["embed_pos.embedding_weight"])
    embedded = case["hidden_size"] ** 0.5 * embedded
    tables = None
    if case["pos_encodings"] == "rope":
        names = ("table/rotary_emb.cos_cached", "table/rotary_emb.sin_cached")
        tables = torch.stack([tensors[name] for name in names]).to(dtype)
    parts = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
    weights = [
        params[f"L_level.layers.{i}.{part}.weight"] for i in range(case["L_layers"])
        for part in parts
    ]  # fmt: skip
    block = TRM._replace(
        mlp_hidden=weights[3].shape[1], positions="none" if tables is None else "rotary"
    )

    def loop(state, injected, n_loops):
        window = n_loops if torch.is_grad_enabled() else 1
        return ops.loop(
            injected, tables, state, weights, n_heads=case["num_heads"], n_loops=n_loops,
            window=window, block=block, backend=backend, precision=precision,
        )[-1]  # fmt: skip

    def cycle(high, low):
        low = loop(low, high + embedded, case["L_cycles"])
        return loop(high, low, 1), low

    high, low = tensors["z_H"].to(dtype), tensors["z_L"].to(dtype)
    with torch.no_grad():
        for _ in range(case["H_cycles"] - 1):
            high, low = cycle(high, low)
    high, low = cycle(high, low)
    logits = high @ params["lm_head.weight"].T
    q = (high[:, 0] @ params["q_head.weight"].T + params["q_head.bias"])[:, 0]
    loss = (logits * tensors["weight_logits"].to(dtype)).mean()
    loss = loss + (q * tensors["weight_q"].to(dtype)).mean()
    loss.backward()
    results = {"out/z_H": high, "out/z_L": low, "out/logits": logits, "out/q_halt": q}
    results |= {f"grad/{name}": param.grad for name, param in params.items()}
    return tensors, results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["trm_tiny", "trm_learned_positions"])
def test_recorded_runs_are_met_as_well_as_by_plain_pytorch(name, precision):
    truth, ours = recorded(name, "triton", torch.float32, precision)
    _, plain = recorded(name, "reference", torch.float32, precision)
    for key, result in ours.items():
        if truth.get(key) is None or result is None or not truth[key].norm():
            continue
        error, of_plain = (relative_error(value, truth[key]) for value in (result, plain[key]))
        factor = 3 if key.startswith("grad/") else 2
        assert error <= factor * of_plain + 4 * FP32_EPS, key


def test_a_recorded_run_of_another_width_is_refused_by_name():
    with pytest.raises(ValueError, match=r"D = 32 is not one of \(64, 128, 256, 512\)"):
        recorded("trm_no_positions", "triton", torch.float32, "fp32")


# --- what the kernels take

TRM_CALL = changed(CALL, block=TRM._replace(mlp_hidden=768))


@pytest.mark.parametrize(
    "block",
    [
        GPT2,
        GPT2._replace(mask="full"),
        TRM,
        TRM._replace(mask="causal"),
        TRM._replace(positions="none"),
        TRM._replace(positions="learned"),
        TRM._replace(norm_eps=1e-6),
        TRM._replace(mlp_hidden=64),
    ],
)
def test_blocks_that_have_kernels(block):
    assert triton_backend.unsupported(changed(CALL, block=block)) is None


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (GPT2._replace(norm_eps=1e-6), "a block with norm_eps = 1e-06"),
        (GPT2._replace(positions="rotary"), "a block with positions = 'rotary'"),
        (GPT2._replace(positions="none"), "a block with positions = 'none'"),
        (GPT2._replace(mlp_hidden=512), "a block with mlp_hidden = 512"),
        (GPT2._replace(bias=False), "a block with bias = False"),
        (GPT2._replace(final_norm=False), "a block with final_norm = False"),
        (GPT2._replace(norm="rms_norm"), "a block with norm = 'rms_norm'"),
        (GPT2._replace(mlp="swiglu"), "a block with mlp = 'swiglu'"),
        (TRM._replace(norm_place="both"), "a block with norm_place = 'both'"),
        (TRM._replace(norm_place="before"), "a block with norm_place = 'before'"),
        (TRM._replace(norm_weight=True), "a block with norm_weight = True"),
        (TRM._replace(norm_bias=True), "a block with norm_bias = True"),
        (TRM._replace(norm="layer_norm"), "a block with norm = 'layer_norm'"),
        (TRM._replace(mlp="gelu"), "a block with mlp = 'gelu'"),
        (TRM._replace(bias=True), "a block with bias = True"),
        (TRM._replace(final_norm=True), "a block with final_norm = True"),
        (
            Block(norm="rms_norm", norm_bias=False, norm_place="both", final_norm=False),
            "a block with norm = 'rms_norm', norm_bias = False, norm_place = 'both', "
            "final_norm = False",
        ),
    ],
)
def test_settings_that_have_no_kernels_are_named(block, reason):
    problem = changed(CALL, block=block, backend="triton")
    assert (triton_backend.unsupported(problem) or "").endswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_embd": 96, "n_heads": 3}, "D = 96 is not one of (64, 128, 256, 512)"),
        ({"n_heads": 2}, "head_dim = 128 is not one of (16, 32, 64)"),
        ({"n_heads": 32}, "head_dim = 8 is not one of (16, 32, 64)"),
        ({"block": TRM._replace(mlp_hidden=100)}, "mlp_hidden = 100 is not a multiple of 64"),
        (
            {"block": TRM._replace(mlp_hidden=64), "batch": 2**16},  # q, k and v are wider
            "4127195136 hidden activations (B S 768) are not below 2^31; use smaller batches",
        ),
        ({"dtype": torch.float64}, "it takes float32 tensors, not torch.float64"),
        (
            {"batch": 2**15},
            "4127195136 hidden activations (B S 1536) are not below 2^31; use smaller batches",
        ),
    ],
)
def test_what_the_kernels_can_not_do_is_said(changes, reason):
    assert triton_backend.unsupported(TRM_CALL) is None
    assert triton_backend.unsupported(changed(TRM_CALL, **changes)) == reason


# --- the ops


@pytest.mark.parametrize(
    ("positions", "injection", "recompute"),
    [("rotary", "add", False), ("none", "mul", True), ("learned", "every_block", False)],
)
def test_the_ops_pass_opcheck(positions, injection, recompute):
    inputs = loop_inputs(B=1, S=3, hidden=64, positions=positions)
    tensors = [None if inputs[name] is None else inputs[name].float() for name in
               ("embeddings", "positions", "state")]  # fmt: skip
    weights = [weight.float() for weight in inputs["weights"]]
    block = settings_of(inputs)["block"]
    settings = (4, 2, 2, injection, "bf16", recompute, "auto", "triton", *block)
    others = (None, None, not recompute, recompute or injection == "mul")
    forward = torch.ops.looped_fast.triton_loop_forward.default
    result, *saved = forward(*tensors, weights, *settings, *others)
    saved[SavedActivations._fields.index("states")] = result
    for wanted in ([True] * 7, [i % 3 > 0 for i in range(7)]):
        torch.library.opcheck(
            torch.ops.looped_fast.triton_loop_backward.default,
            (torch.randn_like(result), saved, *tensors, weights, wanted, *settings),
        )
    for tensor in (tensors[0], tensors[2], *weights):
        tensor.requires_grad_()
    torch.library.opcheck(forward, (*tensors, weights, *settings, *others))


@pytest.mark.parametrize("n_outputs", [1, 9])
def test_predictions_and_the_loss_are_as_accurate_as_plain_pytorch(n_outputs):
    inputs = loop_inputs(S=7)
    read_out = [torch.randn(n_outputs, 64), torch.randn(n_outputs)]
    targets = torch.randn(2, 4, n_outputs)

    def results(dtype, backend):
        def leaf(tensor):
            return tensor.detach().to(dtype).requires_grad_()

        weights = [leaf(weight) for weight in inputs["weights"]]
        arguments = {
            "embeddings": leaf(inputs["embeddings"]), "positions": inputs["positions"].to(dtype),
            "state": leaf(inputs["state"]), "weights": weights,
            "read_out": [leaf(tensor) for tensor in read_out],
        }  # fmt: skip
        settings = settings_of(inputs, n_loops=3, backend=backend)
        loss = ops.loop_mse(**arguments, targets=targets.to(dtype), n_supervised=1, **settings)
        trained = [arguments["embeddings"], *weights, *arguments["read_out"]]
        grads = torch.autograd.grad(loss, trained)
        return [ops.loop(**arguments, **settings).detach(), loss.detach(), *grads]

    truth = results(torch.float64, "reference")
    plain = results(torch.float32, "reference")
    ours = results(torch.float32, "triton")
    assert truth[0].shape == (2, 2, 4, n_outputs)
    for i, exact in enumerate(truth):
        error, of_plain = (relative_error(run[i], exact) for run in (ours, plain))
        assert error <= (2 if i < 2 else 3) * of_plain + 4 * FP32_EPS, i


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (["embeddings"], 0), (["state"], 0), (["weights[0]"], 1), (["weights[5]"], 1),
        (["weights[2]", "weights[7]"], 2), ([f"weights[{i}]" for i in range(8)], 8),
    ],
)  # fmt: skip
def test_gradients_of_a_part_are_those_of_the_whole_and_no_more_is_multiplied(
    trained, products, monkeypatch
):
    inputs = loop_inputs(n_layer=2)
    settings = settings_of(inputs, n_loops=3, window=3, backend="triton")
    whole = run(inputs, torch.ones(3, 2, 11, 64), torch.float32, **settings)
    count, product = [], weight_gradients._product
    monkeypatch.setattr(weight_gradients, "_product", lambda *a: count.append(0) or product(*a))
    tensors = {name: inputs[name].float() for name in ("embeddings", "positions", "state")}
    weights = [weight.float() for weight in inputs["weights"]]
    named = tensors | {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    for name in trained:
        named[name].requires_grad_()
    ops.loop(**tensors, weights=weights, **settings).sum().backward()
    assert len(count) == products
    for name, tensor in named.items():
        assert (tensor.grad is not None) == (name in trained)
        assert tensor.grad is None or torch.equal(tensor.grad, whole[name]), name


def test_a_compiled_step_is_one_graph_with_the_same_numbers():
    inputs = loop_inputs(B=1, S=5, hidden=64)
    settings = settings_of(inputs, n_loops=2, window=1, backend="triton", precision="bf16")
    weights = [weight.float().requires_grad_() for weight in inputs["weights"]]
    tensors = [inputs[name].float() for name in ("embeddings", "positions", "state")]

    def loss():
        return ops.loop(*tensors, weights, **settings).square().mean()

    eager = torch.autograd.grad(loss(), weights)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(), weights)
    assert all(map(torch.equal, grads, eager))


def test_gpt2_sees_all_tokens_where_the_mask_is_full():
    """The mask is attention's, so GPT-2's kernels take either; see ``FAMILIES``."""
    from conftest import loop_inputs as gpt2_inputs

    inputs = gpt2_inputs(B=1, S=5, D=64)
    settings = {"n_heads": 4, "n_loops": 2, "window": 1, "block": GPT2._replace(mask="full")}
    exact = ops.loop(**inputs, **settings, backend="reference")
    single = {name: [t.float() for t in value] if isinstance(value, list) else value.float()
              for name, value in inputs.items()}  # fmt: skip
    plain = ops.loop(**single, **settings, backend="reference")
    ours = ops.loop(**single, **settings, backend="triton")
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact) + 4 * FP32_EPS
    causal = ops.loop(**single, **{**settings, "block": GPT2}, backend="triton")
    assert relative_error(causal, exact) > 0.01
