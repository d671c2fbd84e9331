"""GPUs to plan for, from their makers' data sheets.

Sources: NVIDIA's data sheets of the H100, H200 and A100 Tensor Core GPUs and of the GeForce RTX 4090 (Ada architecture white paper); the H800 is an H100 whose
NVLink is cut to 400 GB/s in both directions together. `memory` is what nvidia-smi shows. Products are dense bf16 with fp32 sums, at the boost clock: a
large product reaches about four fifths of it (798 TFLOP/s were measured on an H100). The network is not part of the GPU: it is what racks of eight are usually built with.
"""

from __future__ import annotations

from dataclasses import dataclass

from red.errors import REDError

NODE = 8  # GPUs that a fast link joins


@dataclass(frozen=True)
class GPU:
    name: str
    memory: int  # bytes
    flops: float  # bf16 products, a second
    bandwidth: float  # of its memory, bytes a second
    link: float  # to the GPUs of its node, bytes a second in one direction
    network: float  # to other nodes, bytes a second in one direction: its share of the node's ports


GPUS: dict[str, GPU] = {
    gpu.name: gpu for gpu in (
        GPU("H100", 81559 << 20, 989.4e12, 3.35e12, 450e9, 50e9),
        GPU("H200", 143771 << 20, 989.4e12, 4.8e12, 450e9, 50e9),
        GPU("H800", 81559 << 20, 989.4e12, 3.35e12, 200e9, 50e9),
        GPU("A100", 81920 << 20, 312e12, 2.039e12, 300e9, 25e9),  # the one of 80 GB
        GPU("RTX4090", 24564 << 20, 165.2e12, 1.008e12, 32e9, 1.5625e9),  # PCIe 4.0 x16; one port of 100 Gbit/s for eight
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of this name, in any case and with or without spaces; REDError lists those that are known."""
    wanted = name.lower().replace(" ", "").replace("-", "")
    for known, gpu in GPUS.items():
        if known.lower() == wanted:
            return gpu
    raise REDError(f"gpu={name!r} is not known; use one of {', '.join(GPUS)}.")
