"""The Triton kernels compiled for a Hopper GPU, without one: registers, spills, vector loads, exponentials an entry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from renio_megatron.losses.kernels import triton_kernels  # noqa: E402
from renio_megatron.losses.kernels.triton_terms import FORWARD_KL, JSD, REVERSE_KL  # noqa: E402
from renio_megatron.losses.kernels.tuning import CANDIDATES, FIXED  # noqa: E402

POINTERS = {
    "student": "logits", "teacher": "logits", "logits": "logits", "gradient": "logits", "columns": "i64",
    **dict.fromkeys(("student_max", "student_log_sum", "teacher_max", "teacher_log_sum"), "fp32"),
    **dict.fromkeys(("slope_total", "factor", "parts"), "fp32"),
}  # fmt: skip
WHOLE_NUMBERS = (
    "student_stride",
    "teacher_stride",
    "out_stride",
    "stride",
    "num_valid",
    "width",
    "blocks",
    "num_parts",
)
KERNELS = {  # name, constants, (exponentials, logarithms) of an entry; None: not counted
    "statistics": ("statistics_kernel", {"CROSS": 0, "WHOLE": True}, None),
    "statistics, teacher's mean": ("statistics_kernel", {"CROSS": 1, "WHOLE": True}, None),
    "statistics, student's mean": ("statistics_kernel", {"CROSS": -1, "WHOLE": False}, None),
    "one model": ("token_statistics_kernel", {"WHOLE": True}, None),
    "sums, forward KL": ("sums_kernel", {"FORM": FORWARD_KL, "CLIPPED": True}, (1, 0)),
    "sums, reverse KL": ("sums_kernel", {"FORM": REVERSE_KL, "CLIPPED": True}, (1, 0)),
    "sums, JSD": ("sums_kernel", {"FORM": JSD, "CLIPPED": True}, (2, 1)),
    "gradient, forward KL": ("gradient_kernel", {"FORM": FORWARD_KL, "CLIPPED": True}, (2, 0)),
    "gradient, reverse KL": ("gradient_kernel", {"FORM": REVERSE_KL, "CLIPPED": False}, (1, 0)),
    "gradient, JSD": ("gradient_kernel", {"FORM": JSD, "CLIPPED": True}, (2, 1)),
    "scaling": ("scale_kernel", {}, (0, 0)),
}
INSTRUCTIONS = re.compile(r"\bex2\.approx\.ftz\.f32|\blg2\.approx\.ftz\.f32")


def compiled(name, constants, launch, dtype="bf16"):
    """PTX of a kernel for compute capability 9.0, with strides and widths that are multiples of 16."""
    kernel = getattr(triton_kernels, name)
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        pointer = POINTERS.get(argument) if argument != "out" else "logits" if name == "gradient_kernel" else "fp32"
        if argument.isupper():
            signature[argument] = "constexpr"
        elif pointer:
            signature[argument] = "*" + pointer.replace("logits", dtype)
        else:
            signature[argument] = "i32" if argument in WHOLE_NUMBERS else "fp32"
        if pointer or (argument in WHOLE_NUMBERS and argument not in ("blocks", "num_parts")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {**constants, "BLOCK": launch.block, "STAGES": launch.stages}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": launch.warps, "enable_fp_fusion": True}).asm[
        "ptx"
    ]


def registers_and_spills(ptx, folder):
    """(registers a thread, bytes spilled) as ptxas reports them."""
    ptxas = Path(get_ptxas(90).path)
    if not ptxas.exists():
        pytest.skip("ptxas is not here")
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said).group(1)), spills


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_fixed_cut(kernel, tmp_path):
    name, constants, expected = KERNELS[kernel]
    ptx = compiled(name, constants, FIXED)
    registers, spilled = registers_and_spills(ptx, tmp_path)
    assert spilled == 0
    assert registers * FIXED.warps * 32 * 3 <= 65536, "three programs on a multiprocessor: 24 warps"
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx), "16 bytes a load"
    if expected is not None:  # in the loop over whole blocks, and once more for the block at the border
        entries = 2 * FIXED.block // (FIXED.warps * 32)
        found = INSTRUCTIONS.findall(ptx)
        assert (found.count("ex2.approx.ftz.f32"), found.count("lg2.approx.ftz.f32")) == tuple(
            entries * number for number in expected
        )
    if name in ("gradient_kernel", "scale_kernel"):
        assert "cvt.rn.bf16x2.f32" in ptx and "st.global.v4.b32" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("launch", CANDIDATES, ids=str)
def test_no_cut_that_is_offered_spills(launch, dtype, tmp_path):
    for kernel, (name, constants, _) in KERNELS.items():
        _, spilled = registers_and_spills(compiled(name, constants, launch, dtype), tmp_path)
        assert spilled == 0, kernel
