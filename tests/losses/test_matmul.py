"""Products that are wider than their factors: when the device's own is taken, when the slow way, and when neither.

No GPU is needed: what torch has on one is played by products on the CPU.
"""

from __future__ import annotations

import logging

import pytest
import torch

from renio_megatron.losses.kernels import matmul

BF16 = torch.bfloat16
HIDDEN, HEAD = torch.arange(6.0).view(3, 2).to(BF16), torch.arange(8.0).view(4, 2).to(BF16)
LOGITS = HIDDEN.float() @ HEAD.float().T
real_mm, real_addmm = torch.mm, torch.addmm


def project():
    return matmul.project_rows(HIDDEN, HEAD, torch.empty(3, 4))


def add_outer():
    """The same product, as a sum over the rows of two matrices [2, 3] and [2, 4]."""
    return matmul.add_outer_(torch.zeros(3, 4), HIDDEN.T.contiguous(), HEAD.T.contiguous())


CALLS = pytest.mark.parametrize("call", [project, add_outer])


class Device:
    """Plays a CUDA device: answers products with `out_dtype` by `error` while there is one, and counts them."""

    def __init__(self):
        self.error, self.asked, self.factor = None, 0, 1.0

    def answer(self):
        self.asked += 1
        if self.error is not None:
            raise self.error

    def mm(self, one, other, *, out_dtype=None, out=None):
        if out_dtype is None:
            return real_mm(one, other, out=out)
        self.answer()
        return out.copy_(real_mm(one.to(out_dtype), other.to(out_dtype)) * self.factor)

    def addmm(self, total, one, other, *, out_dtype=None, out=None):
        self.answer()
        return out.copy_(real_addmm(total, one.to(out_dtype), other.to(out_dtype)))


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(matmul, "_is_on_cuda", lambda rows: True)
    monkeypatch.setattr(torch, "mm", device.mm)
    monkeypatch.setattr(torch, "addmm", device.addmm)
    matmul._has_fp32_product.cache_clear()
    yield device
    matmul._has_fp32_product.cache_clear()


@CALLS
def test_the_devices_product_is_tried_once_and_taken(device, call, caplog):
    for _ in range(2):
        assert torch.equal(call(), LOGITS)
    assert device.asked == 2 + 2, "one trial of both, then one a call"
    assert not caplog.records


FAILURES = {
    "out of memory": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    "out of memory, in cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "an earlier fault": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "out of memory that names a setting": torch.cuda.OutOfMemoryError("CUDA out of memory (out_dtype)"),
}


@CALLS
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_surfaces_and_is_forgotten(device, call, failure, caplog):
    device.error = FAILURES[failure]
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert raised.value is device.error
    assert device.asked == 2, "each call asks"
    device.error = None
    assert torch.equal(call(), LOGITS)
    assert device.asked == 2 + 3, "the product of the device, not the slow way"
    assert not caplog.records


REFUSALS = {
    "an older torch": TypeError("mm() got an unexpected keyword argument 'out_dtype'"),
    "no kernel": NotImplementedError("Could not run 'aten::mm.dtype_out' with arguments from the 'CUDA' backend."),
    "torch's check": RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs"),
    "an old GPU": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`"),
}


@CALLS
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_remembered_and_told_once(device, call, refusal, caplog):
    device.error = REFUSALS[refusal]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(call(), LOGITS)
    assert device.asked == 1
    (record,) = caplog.records
    assert f"torch {torch.__version__} does not multiply torch.bfloat16 into float32" in record.getMessage()
    assert str(device.error)[:40] in record.getMessage() and "slower" in record.getMessage()


@CALLS
def test_a_torch_without_such_products_is_not_tried(device, call, monkeypatch, caplog):
    class Older:
        @staticmethod
        def overloads():
            return ["default", "out"]

    monkeypatch.setattr(torch.ops.aten, "addmm", Older)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(call(), LOGITS)
    assert device.asked == 0
    assert len(caplog.records) == 1 and "no mm and addmm with out_dtype" in caplog.text


@CALLS
def test_a_wrong_product_is_an_error(device, call):
    device.factor = 2.0
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"wrongly: 16 \+ 16 products of ones are 48\.0 instead of 32"):
            call()
    device.factor = 1.0
    assert torch.equal(call(), LOGITS)


@CALLS
def test_the_cpu_is_not_asked(call, monkeypatch, caplog):
    monkeypatch.setattr(matmul, "_has_fp32_product", None)
    assert torch.equal(call(), LOGITS)
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_has_both_products(dtype):
    matmul._has_fp32_product.cache_clear()
    assert matmul._multiplies_into_fp32(torch.ones(1, 1, device="cuda", dtype=dtype))
