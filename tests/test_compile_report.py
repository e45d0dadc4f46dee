"""The compile report: its rules, and that the stored one is good and of these kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import compile_report, compile_store, machine_code
from benchmarks.compile_store import Entry, Group, Key, candidates
from benchmarks.machine_code import ARCHITECTURES
from looped_fast.kernels.tuning import Config

GOOD = {
    "registers": 200, "spills": 0, "spills_in_loop": 0, "shared": 50_000, "products": 4,
    "tensor_core": 96, "async_copy": 40, "special_function": 32, "duplication": 1.0,
    "blocks_per_sm": 2, "instructions": 3000,
}  # fmt: skip


TRIED = Config(32)


def entry(config: Config = TRIED, form: str = "", arch: str = "sm_89", **changes) -> Entry:
    key = Key("some_kernel", arch, 256, "bf16", form, config.astuple(), "0123")
    return key._asdict() | GOOD | changes


def report(*entries: Entry) -> dict[Key, Entry]:
    return {compile_store.key_of(e): e for e in entries}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"spills": 30}, None),  # outside loops
        ({"spills": 30, "spills_in_loop": 2}, "2 spills in a loop"),
        ({"shared": 110_000}, "110000 bytes of shared memory, the limit is 101376"),
        ({"shared": 110_000, "arch": "sm_90"}, None),
        ({"tensor_core": 0}, "without tensor cores"),
        ({"tensor_core": 0, "precision": "fp32"}, None),
        ({"tensor_core": 0, "products": 0}, None),
        ({"error": "PTXASError: out of registers"}, "out of registers"),
    ],
)
def test_what_rules_a_configuration_out(changes: Entry, reason: str | None) -> None:
    found = compile_store.problem(entry() | changes)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_candidates_are_good_in_every_form_and_clean_ones_come_first() -> None:
    spilling, bad_in_one, clean = Config(64), Config(128), Config(16)
    found = compile_store.candidates(
        report(
            entry(spilling, spills=200), entry(bad_in_one), entry(clean),
            entry(bad_in_one, form="without state", spills_in_loop=1),
        )
    )  # fmt: skip
    assert found == {Group("some_kernel", "sm_89", 256, "bf16"): [clean, spilling]}


def test_a_stored_report_comes_back_and_tells_tuning_its_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_store, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(compile_store, "CANDIDATES", tmp_path / "candidates.json")
    (tmp_path / "candidates.json").write_text('{"other_kernel": {"sm_80": {"64 bf16": [[8]]}}}')
    stored = report(entry(), entry(Config(64)), entry(arch="sm_90", spills_in_loop=3))
    compile_store.store(stored)
    assert compile_store.load() == stored
    assert (tmp_path / "candidates.json").read_text() == (
        '{"other_kernel": {"sm_80": {"64 bf16": [[8]]}}, "some_kernel": {"sm_89": '
        '{"256 bf16": [[32, 0, 0, 4, 2], [64, 0, 0, 4, 2]]}, "sm_90": {"256 bf16": []}}}\n'
    )


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, []),
        ({"registers": 190, "tensor_core": 100}, []),
        ({"spills": 8}, ["spills was 0, is 8"]),
        ({"duplication": 2.0}, ["duplication was 1.0, is 2.0"]),
        ({"tensor_core": 48}, ["tensor_core was 96, is 48"]),
        ({"spills_in_loop": 1, "spills": 1}, ["1 spills in a loop"]),
    ],
)
def test_a_regression_is_named(changes: Entry, worse: list[str]) -> None:
    found = compile_report.regressions(entry(**changes), entry())
    assert found == [f"some_kernel sm_89 256 bf16: {reason}" for reason in worse]


ASSEMBLY = """
.text.some_kernel:
        /*0000*/                   STL [R1+0x8], R240 ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR6][R8.64] ;
        /*0020*/              @!P1 LDL R4, [R1+0x8] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   MUFU.RSQ R6, R3 ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_instructions_and_loops_are_read_from_assembly() -> None:
    code, loops = machine_code.parse(ASSEMBLY)
    assert [name for _, name in code][:5] == ["STL", "LDGSTS", "LDL", "HMMA", "BRA"]
    assert loops == [(0x10, 0x40)]  # waits and traps after the last EXIT are none


def test_warps_that_compute_the_same_tile_are_seen() -> None:
    def dot(rows: int, row_warps: int, column_warps: int) -> float:
        return machine_code.duplication(
            "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, "
            f"warpsPerCTA = [{row_warps}, {column_warps}], instrShape = [16, 8]}}>\n"
            f"%y = tt.dot %a, %b, %c : tensor<{rows}x64xbf16, #dot> * tensor<64x32xbf16, #dot> "
            f"-> tensor<{rows}x32xf32, #mma>"
        )

    assert dot(rows=64, row_warps=4, column_warps=1) == 1
    assert dot(rows=32, row_warps=4, column_warps=1) == 2
    assert dot(rows=32, row_warps=1, column_warps=8) == 2


def test_the_stored_report_is_good_and_of_these_kernels() -> None:
    assert compile_report.faults(compile_store.load()) == []


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch.startswith("sm_")])
def test_every_kernel_of_the_papers_model_has_candidates(arch: str) -> None:
    chosen = candidates(compile_store.load())
    for kernel in ("row_forward_kernel", "row_backward_kernel"):
        assert chosen[Group(kernel, arch, 256, "bf16")]
    for kernel in ("attention_forward_kernel", "attention_backward_kernel"):
        for head_dim in (16, 32, 64):
            assert chosen[Group(kernel, arch, head_dim, "bf16")]


def test_what_was_not_compiled_is_listed() -> None:
    stored = compile_store.load()
    group = Group("row_forward_kernel", "sm_90", 256, "bf16")
    without = {key: entry for key, entry in stored.items() if key.group != group}
    assert compile_report.faults(without) == []
    added = set(compile_report.gaps(without)) - set(compile_report.gaps(stored))
    assert "not compiled yet: row_forward_kernel sm_90 256 bf16" in added


def test_kernels_compile_to_what_the_stored_report_says() -> None:
    # In a process of its own: here kernels are interpreted.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--verify"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
