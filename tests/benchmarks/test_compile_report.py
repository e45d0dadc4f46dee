"""Rules of the compile report; the stored one is good and of these kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NO_TRITON

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels.candidates import Config

from benchmarks import compile_report, compile_store, machine_code, phases
from benchmarks.compile_matrix import THOROUGH, VERSIONS, all_forms, screening
from benchmarks.compile_store import SPILL_LIMIT, Entry, Group, Key, candidates
from benchmarks.kernel_launches import WIDTHS
from benchmarks.machine_code import ARCHITECTURES
from benchmarks.phases import Phase

GOOD = {
    "registers": 200, "spills": 0, "spills_in_loop": 0, "spill_share": 0.0, "shared": 50_000,
    "products": 4, "tensor_core": 96, "asynchronous_mma": False, "async_copy": 40,
    "special_function": 32, "duplication": 1.0, "blocks_per_sm": 2, "instructions": 3000,
    "phases": [Phase(1, 2000, 0, 10_000, 5000, 5000, 0), Phase(8, 1000, 0, 90_000, 9000, 0, 10**6)],
}  # fmt: skip


TRIED = Config(32)


def entry(
    config: Config = TRIED, form: str = "", arch: str = "sm_89", triton: str = "3.9",
    kernel: str = "some_kernel", **changes,
) -> Entry:  # fmt: skip
    key = Key(kernel, arch, 256, "bf16", form, config.astuple(), "0123", triton)
    return key._asdict() | GOOD | changes


def report(*entries: Entry) -> dict[Key, Entry]:
    return {compile_store.key_of(e): e for e in entries}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"spills": 30}, None),  # outside loops
        ({"spills": 30, "spills_in_loop": 2, "spill_share": 0.019}, None),
        ({"spills": 30, "spill_share": 0.021}, "2.1% of loops are spills, the limit is 2%"),
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
            entry(bad_in_one, form="without state", spill_share=2 * SPILL_LIMIT),
        )
    )  # fmt: skip
    assert found == {Group("some_kernel", "sm_89", 256, "bf16"): [clean, spilling]}


def test_candidates_are_good_in_every_version_that_compiled_the_group() -> None:
    in_both, bad_in_one, in_one = Config(16), Config(32), Config(64)
    found = compile_store.candidates(
        report(
            entry(in_both), entry(bad_in_one), entry(in_one),
            entry(in_both, triton="3.6"), entry(bad_in_one, triton="3.6", spill_share=0.1),
            entry(in_one, arch="sm_80"),  # the other version compiled nothing for it
        )
    )  # fmt: skip
    assert found == {
        Group("some_kernel", "sm_89", 256, "bf16"): [in_both],
        Group("some_kernel", "sm_80", 256, "bf16"): [in_one],
    }


def test_predicted_time_orders_the_candidates_of_the_row_kernels() -> None:
    def row(config: Config, shared: int, **changes) -> Entry:
        work = [Phase(1, 1000, 0, shared, 1000, 1000, 0)]
        return entry(
            config, arch="sm_90", kernel="row_forward_kernel", phases=work, asynchronous_mma=True,
            **changes,
        )  # fmt: skip

    fast, second, slow = Config(64, 64), Config(64, 32), Config(64, 16)
    high, low, untold = Config(128, 64), Config(16, 16), Config(32, 32)
    found = compile_store.candidates(
        report(
            row(low, 3_000_000), row(slow, 9_000_000), row(second, 8_000_000),
            row(fast, 1_000_000), row(fast, 7_000_000, form="the slowest counts"),
            row(high, 20_000_000), row(untold, 0) | {"phases": []},
        )
    )  # fmt: skip
    # 5248 rows: 82 programs of 64, one wave; 328 of 16, three; the rest is of a kind that there is
    order = [fast, second, low, high]
    assert found == {Group("row_forward_kernel", "sm_90", 256, "bf16"): order}


def test_a_stored_report_comes_back_and_tells_tuning_its_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_store, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(compile_store, "CANDIDATES", tmp_path / "candidates.json")
    (tmp_path / "candidates.json").write_text('{"other_kernel": {"sm_80": {"64 bf16": [[8]]}}}')
    stored = report(entry(), entry(Config(64)), entry(arch="sm_90", spill_share=0.3))
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
        ({"spill_share": 0.5, "spills": 1}, ["50.0% of loops are spills, the limit is 2%"]),
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
    code, loops = phases.parse(ASSEMBLY)
    assert [i.name for i in code][:5] == ["STL", "LDGSTS", "LDL", "HMMA", "BRA"]
    assert loops == [(0x10, 0x40)]  # waits and traps after the last EXIT are none


def test_spills_are_counted_against_all_instructions_in_loops() -> None:
    code, loops = list(range(100)), [(10, 19), (50, 89)]
    assert machine_code._spill_share(code, loops, spills=[5, 12, 60, 95]) == 2 / 50
    assert machine_code._spill_share(code, [], spills=[5]) == 0


TTIR = """
    %x = tt.load %p : tensor<32x64x!tt.ptr<f32>> loc(#loc)
    %y:2 = scf.for %c = %c0_i32 to %c256_i32 step %c64_i32 iter_args(%a = %b) -> (f32)  : i32 {
      %w = tt.load %q : tensor<64x64x!tt.ptr<bf16>> loc(#loc)
      %d = tt.dot %v, %w, %a : tensor<32x64xbf16> * tensor<64x64xbf16> -> tensor<32x64xf32>
    } loc(#loc)
    tt.store %r, %z, %m : tensor<32x!tt.ptr<f32>> loc(#loc)
"""
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 2], instrShape = [16, 8]}>
    %y:2 = scf.for %c = %c0_i32 to %c192_i32 step %c64_i32 iter_args(%a = %b) -> (f32)  : i32 {
      %d = tt.dot %v, %w, %a : tensor<32x64xbf16, #x> * tensor<64x64xbf16, #y> -> tensor<32x64xf32, #mma>
    } loc(#loc)
"""  # noqa: E501


def test_phases_hold_what_the_code_does_outside_loops_and_in_them() -> None:
    outside, loop = phases.phases(ASSEMBLY, TTIR, TTGIR, num_warps=4)
    # The pipeliner took one of four passes out of the loop: what it loads is loaded outside.
    weights = 64 * 64 * 2
    assert (outside.trips, outside.spills, outside.shared) == (1, 1, 4 * 128)
    assert (outside.loaded, outside.stored) == (32 * 64 * 4 + weights, 32 * 4 + 4 * 128)
    assert (loop.trips, loop.instructions, loop.spills) == (3, 4, 1)
    assert loop.shared == 4 * (512 + 128)  # LDGSTS.128 and LDL, by four warps
    assert (loop.loaded, loop.stored) == (weights + 4 * 128, 0)
    assert loop.flops == 2 * 32 * 64 * 64
    assert phases.phases(ASSEMBLY, TTIR, "", num_warps=4) == []  # loops can't be told apart


def test_operands_that_tensor_cores_read_from_shared_memory_are_counted() -> None:
    def shared(row_warps: int, column_warps: int, columns: int, a: str) -> int:
        layout = (
            "#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, "
            f"warpsPerCTA = [{row_warps}, {column_warps}], instrShape = [16, {columns}, 16]}}>\n"
        )
        dot = (
            f"%y = ttng.warp_group_dot %a, %b, %c : {a} * "
            "!ttg.memdesc<64x128xbf16, #s, #smem> -> tensor<64x128xf32, #mma>"
        )
        code = "    /*0000*/    EXIT ;"
        return phases.phases(code, "", layout + dot, num_warps=4)[0].shared

    a, b = 64 * 64 * 2, 64 * 128 * 2
    in_shared, in_registers = "!ttg.memdesc<64x64xbf16, #s, #smem>", "tensor<64x64xbf16, #r>"
    assert shared(4, 1, 128, in_registers) == b
    assert shared(4, 1, 128, in_shared) == a + b
    assert shared(4, 2, 32, in_shared) == 4 * a + b  # each instruction of 32 columns reads a again
    assert shared(8, 1, 128, in_shared) == 2 * (a + b)  # both groups of warps compute the same


def test_warps_that_compute_the_same_tile_are_seen() -> None:
    def dot(rows: int, row_warps: int, column_warps: int) -> float:
        return phases.duplication(
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


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch.startswith("sm_")])
def test_every_kernel_of_trms_block_has_candidates(arch: str) -> None:
    chosen = candidates(compile_store.load())
    for kernel in ("after_norm_forward_kernel", "after_norm_backward_kernel"):
        for width in WIDTHS:
            assert chosen[Group(kernel, arch, width, "bf16")]


def test_attention_is_compiled_at_either_mask() -> None:
    stored = compile_store.load()
    for group, chosen in candidates(stored).items():
        if group.kernel.startswith("attention_") and chosen and group.precision == "bf16":
            first = chosen[0].astuple()
            forms = {key.form for key in stored if key.group == group and key.config == first}
            assert forms == {"CAUSAL=True", "CAUSAL=False"}, group


def test_the_forms_of_a_mask_are_tried_alike() -> None:
    jobs = [job for job in screening(THOROUGH) if job.case.kernel.startswith("attention_")]
    causal, full = (
        {(job.group, job.configs, job.enough) for job in jobs if job.case.form == form}
        for form in ("CAUSAL=True", "CAUSAL=False")
    )
    assert causal == full
    assert len(jobs) == 2 * len(causal)


def test_what_was_not_compiled_is_listed() -> None:
    stored = compile_store.load()
    group = Group("row_forward_kernel", "sm_90", 256, "bf16")
    for version in VERSIONS:
        without = {
            key: entry for key, entry in stored.items()
            if key.group != group or key.triton != version
        }  # fmt: skip
        assert compile_report.faults(without) == []
        added = set(compile_report.gaps(without)) - set(compile_report.gaps(stored))
        missing = f"not compiled yet by Triton {version}: row_forward_kernel sm_90 256 bf16"
        assert missing in added


def test_a_version_but_the_thorough_one_is_compiled_for_the_papers_model() -> None:
    older = next(version for version in VERSIONS if version != THOROUGH)
    groups = {job.group for job in screening(older)}
    assert groups < {job.group for job in screening(THOROUGH)}
    assert Group("row_backward_kernel", "sm_90", 256, "fp16") in groups
    assert not {group for group in groups if group.precision in ("fp32", "tf32")}
    chosen = {Group("row_forward_kernel", "sm_80", 512, "bf16"): [TRIED]}
    assert all_forms(chosen, older) == all_forms(chosen, THOROUGH) == []


def test_what_another_version_found_good_is_tried_first() -> None:
    group, last = Group("row_forward_kernel", "sm_89", 256, "bf16"), Config(16, 16, 16, 8, 1)
    job = next(j for j in screening(THOROUGH, {group: [last]}) if j.group == group)
    assert job.configs[0] == last
    assert job.configs.count(last) == 1


def test_kernels_compile_to_what_the_stored_report_says() -> None:
    # A process of its own is needed: kernels are interpreted in this one.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--verify"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
