"""Kernels by name, and time by class and by scale from a trace."""

from __future__ import annotations

import pytest

from flexvar_bench.gpu.kernel_classes import CLASSES, OTHER, OURS, Kernel, classify, kernels_of, summary
from flexvar_runtime.cuda.kernels import KernelConfig
from flexvar_runtime.cuda.layers import LayerConfig

NAMES = {
    "sample_rows": "sampling",
    "draws": "sampling",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(...)": "sampling",
    "void at_cuda_detail::cub::DeviceSegmentedRadixSortKernel<...>": "sampling",
    "next_inputs": "next_inputs",
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "gemm",
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel": "gemm",
    "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x64_32x4_nn_align8>(...)": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __half, __half, float>": "gemm",
    # measured on an H200, 2026-11-28, through cuBLASLt and cuDNN themselves
    "nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_gelubias_NNT": "gemm",
    "nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_splitK_bias_NNT": "gemm",
    "_ZN8cublasLt19splitKreduce_kernelILi32ELi16Eif6__halffS1_Lb0EfS1_S1_Lb1ELb1ELb0ELb0EEEv": "gemm",
    "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64_stage4__5x_cudnn": "convolution",
    "void cudnn::cnn::conv2d_grouped_direct_kernel<false, true, false, false, __half>(...)": "convolution",
    "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false>": "convolution",
    "sm90_xmma_dgrad_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution",
    "sm90_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution",
    "void reduce_tensor_kernel_free<float, 8, 16, 1, 1, (cudnnReduceTensorOp_t)7>(...)": "normalisation+elementwise",
    "modulate_rows": "normalisation+elementwise",
    "split_heads": "normalisation+elementwise",
    "attention_rows": "attention",
    "im2col": "convolution",
    "void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>": "gemm",
    "_gemm_mha_v2_0x1c8d5e": "attention",
    "fmha_v2_flash_attention_fp16_64_64_S_q_paged_kv_64_sm90_kernel": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(...)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x64_4x1x1": "attention",
    "void onnxruntime::cuda::SoftmaxWarpForward<float, float, float, 9, false>": "attention",
    "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_kernel__5x_cudnn": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x64_nhwc_align8>": "convolution",
    "void cudnn::winograd_nonfused::winogradForwardFilter4x4<float, float>": "convolution",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>": "copies",
    "Memcpy DtoH (Device -> Pinned)": "copies",
    "Memset (Device)": "copies",
    "gather_rows": "copies",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>": "copies",
    "void onnxruntime::cuda::Transpose3DKernel<2u, 32u, 32u>": "copies",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": "copies",
    "to_uint8": "normalisation+elementwise",
    "__myl_AddCastMeanSubMulMeanAddSqrtDivMulMulAdd_0x5a9c": "normalisation+elementwise",
    "triton_per_fused_add_mul_native_layer_norm_3": "normalisation+elementwise",
    "void onnxruntime::cuda::cuApplyLayerNorm<float, float, float, false>": "normalisation+elementwise",
    "void onnxruntime::cuda::_UnaryElementWise<float, float, OP_Gelu<float>, 256, 4>": "normalisation+elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": "normalisation+elementwise",
    "a_kernel_nobody_knows": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_classes(name: str) -> None:
    assert classify(name) == NAMES[name]


def test_every_class_has_an_example() -> None:
    assert set(NAMES.values()) == set(CLASSES)


def test_every_kernel_of_ours_has_a_class() -> None:
    """Not by chance, by a pattern that its name happens to match."""
    assert set(OURS) == {*KernelConfig.names, *LayerConfig.names}
    assert set(OURS.values()) <= set(CLASSES) - {OTHER}


# microseconds; a request's rows are gathered, then two scales, then the decoder, then the pixels leave
GENERATION = [
    Kernel("Memcpy HtoD (Pinned -> Device)", 0, 1),
    Kernel("gather_rows", 2, 1),
    Kernel("Memset (Device)", 4, 1),
    Kernel("nvjet_hsh", 100, 20),
    Kernel("sample_rows", 120, 5),
    Kernel("next_inputs", 125, 5),
    Kernel("nvjet_hsh", 130, 30),
    Kernel("sample_rows", 160, 10),
    Kernel("sm90_xmma_fprop", 170, 40),
    Kernel("to_uint8", 210, 5),
    Kernel("Memcpy DtoH (Device -> Pinned)", 215, 7),
]


def test_time_by_class_and_scale() -> None:
    found = summary(GENERATION, scales=2, top=2)
    assert found["scale_s"] == pytest.approx([25e-6, 45e-6])
    assert found["decoder_s"] == pytest.approx(45e-6)
    assert found["classes"]["gemm"]["seconds"] == pytest.approx(50e-6)
    assert found["classes"]["sampling"]["share"] == pytest.approx(15 / 125)
    assert sum(part["share"] for part in found["classes"].values()) == pytest.approx(1)
    assert [(top["name"], top["launches"]) for top in found["top"]] == [("nvjet_hsh", 2), ("sm90_xmma_fprop", 1)]
    assert found["top"][0]["us_each"] == pytest.approx(25) and found["top"][0]["share"] == pytest.approx(50 / 125)


def test_scales_that_cannot_be_told_apart_are_not_guessed() -> None:
    found = summary(GENERATION, scales=10)
    assert (found["scale_s"], found["decoder_s"]) == (None, None)
    assert found["scale_how"] == "not measured: 2 sample_rows kernels for 10 scales"
    assert summary([], scales=10) == {"reason": "the profiler saw no kernel"}


def test_a_trace_of_the_profiler() -> None:
    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "later", "ts": 20.5, "dur": 2},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 50},
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 3, "dur": 1.5},
            {"ph": "s", "id": 3, "name": "ac2g"},
        ]
    }
    assert kernels_of(trace) == [Kernel("Memcpy DtoD", 3, 1.5), Kernel("later", 20.5, 2)]
