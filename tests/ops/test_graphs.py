"""Graphs by key, tested without a GPU: see ``fake_graphs``."""

import contextlib
import copy
import pickle

import pytest
import torch
from conftest import cast, loop_inputs, small_model
from fake_graphs import FakeGraph

from looped_fast import ops
from looped_fast.ops import graphed_loop, graphs, op
from looped_fast.ops.call import LoopSettings, LoopTensors
from looped_fast.ops.graphed_loop import GraphedLoop
from looped_fast.ops.graphs import Graphs, graphs_on


def counting(budget=10**9, fail=None, **settings):
    """Make graphs that list their calls; ``fail(n)`` may raise at the n-th capture."""
    calls = []

    class Failing(FakeGraph):
        def capture(self, work):
            if fail:
                fail(calls.count("capture") + calls.count("failed capture"))
            return super().capture(work)

    return Graphs(lambda: Failing(calls), budget, **settings), calls


def double(x):
    return 2 * x


def test_the_first_call_warms_up_the_second_captures_and_all_others_replay():
    subject, calls = counting()
    for value in (1.0, 2.0, 3.0):
        assert subject.run("key", double, torch.tensor([value])).tolist() == [2 * value]
    assert calls == ["warm up", "capture", "replay", "replay"]


def test_capture_at_sets_the_call_that_captures():
    subject, calls = counting(capture_at=4)
    counts = []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        assert subject.run("key", double, torch.tensor([value])).tolist() == [2 * value]
        counts.append(len(calls))
    assert calls == ["warm up", "capture", "replay", "replay"]
    assert counts == [0, 0, 1, 3, 4]


def test_a_result_is_the_callers_own():
    subject, _ = counting()
    results = [subject.run("key", double, torch.tensor([float(i)])) for i in range(4)]
    assert [r.item() for r in results] == [0, 2, 4, 6]


def test_keys_have_their_own_graphs():
    subject, calls = counting()
    for _ in range(3):
        assert subject.run("a", double, torch.ones(2)).shape == (2,)
        assert subject.run("b", double, torch.ones(3)).shape == (3,)
    assert calls.count("capture") == 2
    assert calls.count("replay") == 4


def test_the_least_recently_used_are_dropped_over_budget():
    subject, calls = counting(budget=250)  # two graphs of 100
    for key in ("a", "a", "b", "b", "a", "c", "c"):  # the third drops b
        subject.run(key, double, torch.ones(1))
    del calls[:]
    subject.run("a", double, torch.ones(1))
    assert calls == ["replay"]
    subject.run("b", double, torch.ones(1))
    assert calls == ["replay", "warm up"]  # b starts from the beginning


def test_the_least_recently_used_are_dropped_over_the_limit_on_number(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    subject, calls = counting()
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        subject.run(key, double, torch.ones(1))
    del calls[:]
    for key in ("a", "c", "b"):
        subject.run(key, double, torch.ones(1))
    assert calls == ["replay", "replay", "warm up"]


def test_keys_that_come_once_are_forgotten(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_COUNTED", 2)
    subject, calls = counting()
    for key in ("a", "b", "c", "a", "c"):  # c drops a
        subject.run(key, double, torch.ones(1))
    assert calls == 4 * ["warm up"] + ["capture", "replay"]
    assert len(subject._calls) <= 2


def test_the_newest_graph_stays_whatever_it_holds():
    subject, calls = counting(budget=1)
    for _ in range(3):
        subject.run("a", double, torch.ones(1))
    assert calls == ["warm up", "capture", "replay", "replay"]


def test_a_capture_that_fails_falls_back_and_says_why_once():
    def fail(n):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    subject, calls = counting(fail=fail)
    cleaned = []
    subject.run("a", double, torch.ones(1))
    with pytest.warns(UserWarning, match="graphs are off.*not permitted when stream is capturing"):
        result = subject.run("a", double, torch.ones(1), clean_up=lambda: cleaned.append(1))
    assert result.item() == 2
    assert cleaned == [1]
    assert "RuntimeError: operation not permitted" in subject.unsupported
    assert "more" not in subject.unsupported
    assert subject.run("a", double, torch.ones(1)).item() == 2
    assert calls == ["warm up"]


def test_the_reason_of_a_failed_capture_is_the_first_error():
    def fail(n):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:  # as torch.cuda.graph does
            raise RuntimeError("operation failed due to a previous error during capture")

    subject, _ = counting(fail=fail)
    subject.run("a", double, torch.ones(1))
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        subject.run("a", double, torch.ones(1))


def test_a_failed_capture_may_have_no_message():
    def fail(n):
        raise RuntimeError

    subject, _ = counting(fail=fail)
    subject.run("a", double, torch.ones(1))
    with pytest.warns(UserWarning, match="a capture failed .RuntimeError"):
        assert subject.run("a", double, torch.ones(1)).item() == 2


def test_a_capture_that_fails_is_an_error_where_graphs_are_required():
    def fail(n):
        raise RuntimeError("not permitted")

    subject, _ = counting(fail=fail, required=True)
    subject.run("a", double, torch.ones(1))
    with pytest.raises(RuntimeError, match="cuda_graphs = 'on' asks for it: RuntimeError: not per"):
        subject.run("a", double, torch.ones(1))


def test_work_that_reads_values_on_the_host_is_not_captured():
    subject, _ = counting()
    for work in (lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor(1.0)):
        subject, _ = counting()
        subject.run("a", work, torch.ones(2))
        with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
            subject.run("a", work, torch.ones(2))


def test_without_memory_for_another_graph_the_others_make_room():
    def fail(n):
        if n == 1 and not calls.count("failed capture"):
            calls.append("failed capture")
            raise torch.OutOfMemoryError("CUDA out of memory")

    subject, calls = counting(fail=fail)
    for key in ("a", "a", "b", "b", "b"):
        subject.run(key, double, torch.ones(1))
    assert calls[-4:] == ["failed capture", "capture", "replay", "replay"]
    del calls[:]
    for _ in range(2):
        subject.run("a", double, torch.ones(1))
    assert calls == ["warm up", "capture", "replay"]


def test_without_memory_for_a_first_graph_there_are_none():
    def fail(n):
        raise torch.OutOfMemoryError("CUDA out of memory")

    subject, _ = counting(fail=fail)
    subject.run("a", double, torch.ones(1))
    with pytest.warns(UserWarning, match="CUDA out of memory"):
        subject.run("a", double, torch.ones(1))


@pytest.mark.parametrize(
    ("mode", "reason"), [("auto", "need a CUDA device, and this is cpu"), ("off", "= 'off'")]
)
def test_on_a_cpu_there_are_none_with_the_reason(mode, reason):
    subject = graphs_on(torch.device("cpu"), mode)
    assert reason in subject.unsupported
    assert subject.run("key", double, torch.ones(1)).item() == 2


def test_graphs_on_a_cpu_can_not_be_required():
    with pytest.raises(ValueError, match="cuda_graphs = 'on', but they need a CUDA device"):
        graphs_on(torch.device("cpu"), "on")
    with pytest.raises(ValueError, match="cuda_graphs = 'on', but they need a CUDA device"):
        small_model_with("on")(torch.randn(1, 2, 3), torch.randn(1, 2))


def test_an_unknown_mode_is_refused():
    for make in (GraphedLoop, lambda mode: graphs_on(torch.device("cpu"), mode)):
        with pytest.raises(ValueError, match="unknown cuda_graphs 'of'; did you mean 'off'"):
            make("of")


# --- the loop -------------------------------------------------------------------------------------


def small_model_with(mode):
    model = small_model()
    model.graphed = GraphedLoop(mode)
    return model


@pytest.fixture
def graphed(monkeypatch):
    """A graphed loop that treats CPU tensors as CUDA tensors, and the list of its calls."""
    subjects, calls = {}, []

    def graphs_on(device, mode, capture_at):
        return subjects.setdefault(
            device, Graphs(lambda: FakeGraph(calls), 10**9, capture_at=capture_at)
        )

    monkeypatch.setattr(graphed_loop, "graphs_on", graphs_on)
    monkeypatch.setattr(graphed_loop, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(graphed_loop, "_stream", lambda device: 0)
    loop = GraphedLoop()

    def by_name(embeddings, positions, state, weights, **settings):
        tensors = LoopTensors(embeddings, positions, state, weights, [])
        return loop(tensors, LoopSettings(**settings))

    return by_name, calls


SETTINGS = {"n_heads": 2, "n_loops": 3, "window": 2, "backend": "reference"}


def test_a_loop_is_replayed_on_new_inputs_and_changed_weights(graphed):
    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32)
    for i in range(4):
        inputs["embeddings"] = torch.randn(2, 6, 16)
        inputs["weights"][2].mul_(1 + i / 10)  # in place, as an optimizer does
        assert torch.equal(loop(**inputs, **SETTINGS), ops.loop(**inputs, **SETTINGS))
    assert calls == ["warm up", "capture", "replay", "replay"]  # the first call is as usual


def test_a_loop_without_an_initial_state_is_another_kind(graphed, monkeypatch):
    run, seen = op.run, []

    def run_from_zeros(tensors, settings):
        seen.append(tensors.state)
        if tensors.state is None:
            tensors = tensors._replace(state=torch.zeros_like(tensors.embeddings))
        return run(tensors, settings)

    monkeypatch.setattr(op, "run", run_from_zeros)
    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32) | SETTINGS
    zeros = inputs | {"state": torch.zeros_like(inputs["state"])}
    expected = ops.loop(**zeros)
    seen.clear()
    for _ in range(3):
        assert torch.equal(loop(**inputs | {"state": None}), expected)
    assert seen == [None, None, None]
    loop(**zeros)
    loop(**zeros)
    assert calls == ["warm up", "capture", "replay", "warm up"]


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.update(embeddings=torch.randn(3, 6, 16), state=torch.randn(3, 6, 16)),
        lambda i: i.update(positions=i["positions"].clone()),
        lambda i: i["weights"].__setitem__(5, i["weights"][5].clone()),
        lambda i: i.update(n_loops=4),
        lambda i: i.update(precision="bf16"),
    ],
    ids=["shape", "positions moved", "weights moved", "loops", "precision"],
)
def test_another_kind_of_call_is_another_graph(graphed, change):
    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32) | SETTINGS
    for _ in range(3):
        loop(**inputs)
    change(inputs)
    for _ in range(2):
        assert torch.equal(loop(**inputs), ops.loop(**inputs))
    assert calls == ["warm up", "capture", "replay", "warm up"]


def test_calls_with_gradient_are_not_replayed(graphed):
    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32)
    inputs["weights"][2].requires_grad_()
    for _ in range(3):
        loop(**inputs, **SETTINGS).sum().backward()
    assert inputs["weights"][2].grad is not None
    assert calls == []
    with torch.no_grad():
        for _ in range(2):
            loop(**inputs, **SETTINGS)
    assert calls == ["warm up"]


def test_graphs_from_inference_mode_serve_outside_of_it(graphed):
    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32)
    with torch.inference_mode():
        for _ in range(3):
            loop(**inputs, **SETTINGS)
    assert torch.equal(loop(**inputs, **SETTINGS), ops.loop(**inputs, **SETTINGS))
    assert calls.count("capture") == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_with_graphs_can_be_copied(graphed, duplicate):
    model = small_model()
    xs, ys = torch.randn(2, 5, 3), torch.randn(2, 5)
    with torch.no_grad():
        for _ in range(4):
            expected = model(xs, ys)
        del graphed[1][:]
        copied = duplicate(model)
        for _ in range(2):
            assert torch.equal(copied(xs, ys), expected)
    assert graphed[1] == ["warm up"]


def test_a_counter_of_operations_sees_them(graphed):
    from torch.utils.flop_counter import FlopCounterMode

    loop, calls = graphed
    inputs = cast(loop_inputs(), torch.float32)
    with FlopCounterMode(display=False) as counter:
        loop(**inputs, **SETTINGS)
    assert counter.get_total_flops() > 0
    assert calls == []


# --- the real graph, on a stand-in for CUDA -------------------------------------------------------


class FakeCuda:
    """Streams and graphs that list their calls; ``end`` may raise, as CUDA's may."""

    def __init__(self, monkeypatch, end=lambda: None):
        self.calls, self.current, self.end = [], "caller", end
        cuda = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def register_generator_state(self, generator):
                cuda.calls.append("register")

            def replay(self):
                cuda.calls.append(f"replay on {cuda.current}")

        @contextlib.contextmanager
        def on_stream(stream):
            before, cuda.current = cuda.current, stream.name
            try:
                yield
            finally:
                cuda.current = before

        class Capture:  # like torch.cuda.graph: where the end fails, its stream stays current
            def __init__(self, graph, *, stream, capture_error_mode):
                self.stream = stream

            def __enter__(self):
                cuda.calls.append(f"begin on {self.stream.name}")
                cuda.current = "capturing"

            def __exit__(self, *error):
                cuda.calls.append("end")
                cuda.end()
                cuda.current = self.stream.name

        reserved = iter([500, 800])
        for name, value in {
            "CUDAGraph": CUDAGraph,
            "graph": Capture,
            "stream": on_stream,
            "current_stream": lambda: Stream(cuda.current),
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "memory_reserved": lambda device: next(reserved),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "_side_stream_of", lambda index: Stream())


def test_a_graph_is_captured_on_a_side_stream_and_replayed_on_the_callers(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graph = graphs.CudaGraph(torch.device("cuda"), torch.Generator())
    around = ["side waits for caller", "caller waits for side"]
    assert graph.warm_up(lambda: cuda.current) == "side"
    assert cuda.calls == around
    cuda.calls.clear()
    assert graph.capture(lambda: cuda.current) == "capturing"
    assert cuda.calls == ["register", around[0], "begin on side", "end", around[1]]
    assert graph.n_bytes == 300
    graph.replay()
    assert cuda.calls[-1] == "replay on caller"


def test_a_failed_capture_leaves_the_callers_stream(monkeypatch):
    def end():
        raise RuntimeError("operation failed due to a previous error during capture")

    cuda = FakeCuda(monkeypatch, end)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.CudaGraph(torch.device("cuda")).capture(lambda: None)
    assert cuda.current == "caller"
