"""Every CUDA kernel, as nvcc builds it for every architecture, stays inside benchmarks/gpu_budgets.toml."""

import cuda_report
import gpu_budgets
import pytest

RULES = gpu_budgets.load("cuda")
TARGETS = {"sm80", "sm86", "sm89", "sm90", "sm100"}


@pytest.fixture(scope="module")
def kernels():
    reason = cuda_report.missing()
    if reason is not None:
        pytest.skip(f"the CUDA library cannot be built here: {reason}")
    return cuda_report.kernels(cuda_report.build())


@pytest.fixture(scope="module")
def disassembled(kernels):
    if cuda_report.cuobjdump() is None:
        pytest.skip("no cuobjdump was found on PATH, in CUDA_HOME or in Triton's package")
    return kernels


def test_every_kernel_is_there_for_every_architecture(kernels):
    names = {kernel.kernel for kernel in kernels}
    assert names == {
        *("attention_forward_kernel", "attention_delta_kernel", "attention_dq_kernel", "attention_dkdv_kernel"),
        "attention_terms_kernel",
        *("layer_norm_kernel", "layer_norm_backward_kernel", "column_sums_kernel"),
        *("activation_kernel", "activation_backward_kernel", "dropout_kernel"),
        *("cross_entropy_kernel", "cross_entropy_backward_kernel", "loss_sum_kernel"),
        *("log_prob_kernel", "log_prob_backward_kernel"),
        "rotary_kernel",
    }
    for name in names:
        variants = [kernel for kernel in kernels if kernel.kernel == name]
        assert {kernel.target for kernel in variants} == TARGETS
        assert len(variants) % len(TARGETS) == 0


def test_kernels_stay_inside_their_budget(kernels):
    broken = []
    for kernel in kernels:
        measured = {"spills": kernel.spills, "shared": kernel.shared, "registers": kernel.registers}
        facts = kernel.facts
        if not set(gpu_budgets.limits(RULES, facts)) & {"mma"}:
            broken += gpu_budgets.violations(RULES, facts, measured)
            continue
        measured["mma"] = kernel.mma if kernel.instructions else gpu_budgets.limits(RULES, facts)["mma"]
        broken += gpu_budgets.violations(RULES, facts, measured)
    assert not broken, "\n".join(broken)


def test_attention_does_not_spill_at_64_and_128(kernels):
    attention = [kernel for kernel in kernels if "head_dim" in kernel.facts and kernel.facts["dtype"] != "float32"]
    assert {kernel.facts["head_dim"] for kernel in attention} == {64, 128}
    assert [kernel for kernel in attention if kernel.spills] == []


def test_the_instructions_are_those_that_the_sources_claim(disassembled):
    for kernel in disassembled:
        count = kernel.instructions
        if kernel.target not in ("sm80", "sm90"):
            continue
        assert count is not None, kernel
        assert count["LDL"] == count["STL"] == 0 or kernel.spills, f"arrays in local memory: {kernel}"
        if "head_dim" in kernel.facts:
            assert count["LDGSTS.E.BYPASS.128"] > 0, f"no asynchronous 16-byte copy: {kernel}"
            if kernel.kernel != "attention_terms_kernel":  # which writes by bucket
                assert count["STG.E.128"] > 0, f"no 16-byte store: {kernel}"
            if kernel.facts["dtype"] != "float32":
                assert count["HMMA"] > 0, f"no matrix instruction: {kernel}"
                assert count["LDSM"] > 0, f"no ldmatrix: {kernel}"
        elif kernel.kernel not in ("attention_delta_kernel", "column_sums_kernel", "loss_sum_kernel"):
            assert count["LDG.E.128"] > 0, f"no 16-byte load: {kernel}"
        if kernel.kernel in ("dropout_kernel", "layer_norm_kernel", "activation_kernel", "rotary_kernel"):
            assert count["STG.E.128"] > 0, f"no 16-byte store: {kernel}"
