"""What common cards compute at most: dense products of matrices in bfloat16, summed in float32.

Data sheets print figures for sparse matrices large, twice these; training has none. A name must match as a whole: a
card under another name, a slice of one (MIG) or the laptop's kind has another peak, and unknown is better than wrong.
"""

from __future__ import annotations

import re

# (the name that torch.cuda.get_device_name gives, TFLOP/s, source)
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"A100.*|A800.*", 312.0, _NVIDIA + "a100/"),
    (r"A30", 165.0, _NVIDIA + "products/a30-gpu/"),
    (r"A40", 149.7, _NVIDIA + "a40/"),
    (r"A10", 125.0, _NVIDIA + "products/a10-gpu/"),
    # half of what these print, which is for sparse matrices
    (r"H100 80GB HBM3|H100 SXM.*|H800|GH200.*|H200", 989.5, _NVIDIA + "h200/, h100/, grace-hopper-superchip/"),
    (r"H100 PCIe", 756.5, _NVIDIA + "h100/"),
    (r"H100 NVL|H200 NVL", 835.5, _NVIDIA + "h200/, h100/"),
    (r"H20", 148.0, "NVIDIA H20 data sheet"),
    # a board of eight has 36 PFLOP/s sparse, a GB200 of two GPUs 10
    (r"B200", 2250.0, _NVIDIA + "hgx/"),
    (r"GB200", 2500.0, _NVIDIA + "gb200-nvl72/"),
    (r"L4", 121.0, _NVIDIA + "l4/"),
    (r"L40", 181.05, _NVIDIA + "l40/"),
    (r"L40S", 362.05, _NVIDIA + "l40s/"),
    (r"RTX A6000", 154.8, "NVIDIA Ampere GA102 whitepaper, appendix"),
    (r"RTX 6000 Ada Generation", 364.2, "NVIDIA Ada ProViz whitepaper, appendix"),
    (r"GeForce RTX 3090", 71.0, "NVIDIA Ampere GA102 whitepaper, appendix: with sums in float32"),
    (r"GeForce RTX 4090", 165.2, "NVIDIA Ada whitepaper, appendix: with sums in float32"),
    (r"GeForce RTX 5090", 209.5, "NVIDIA RTX Blackwell whitepaper, appendix: with sums in float32"),
    (r"Instinct MI300X.*", 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    (r"Instinct MI325X.*", 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a card at most, None for one that the table lacks.

    Args:
        device_name: From `torch.cuda.get_device_name`.
    """
    name = re.sub(r"^(NVIDIA|AMD)\s+", "", device_name.strip())
    if "MIG" in name.split():
        return None
    found = [peak for pattern, peak, _ in PEAKS if re.fullmatch(pattern, name)]
    return found[0] * 1e12 if found else None
