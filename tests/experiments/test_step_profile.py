"""Kernels of a training step are told apart by their names, as a GPU gives them."""

from __future__ import annotations

import pytest
from places import ROOT


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x80x128", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*, void*)", "attention"),
        ("_spread_kernel", "Lighthouse"),
        ("_score_first_kernel", "Lighthouse"),
        ("_causal_kernel", "Lighthouse"),
        ("_window_dk_dv_kernel", "windows"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused__to_copy_add_mul_pow_1", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<c10::BFloat16>>", "elementwise"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>", "copies"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "other"),
    ],
)
def test_a_kernel_has_the_kind_of_its_name(name, kind, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from step_profile import kind_of, own_kernels

    assert kind_of(name, own_kernels()) == kind
