"""How much of what a device can do a training step does."""

import torch

# Dense TFLOP/s of one chip from its data sheet, by a part of its name and the precision.
_PEAK_TFLOPS = {
    ("H200", "bf16"): 989.0,
    ("H100", "bf16"): 989.0,
    ("A100", "bf16"): 312.0,
    ("H200", "fp32"): 67.0,
    ("H100", "fp32"): 67.0,
    ("A100", "fp32"): 19.5,
}


def known_peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the peak of a device's data sheet, ``None`` where it is not known.

    A processor's depends on its clock and its cores; give it as ``peak_tflops`` if you know it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [
        peak for (chip, kind), peak in _PEAK_TFLOPS.items() if chip in name and kind == precision
    ]
    return peaks[0] if peaks else None


def throughput(
    flop_per_s: float, num_processes: int, peak_tflops: float | None
) -> dict[str, float]:
    """Report FLOP/s of all processes and, where the peak is known, their share of it.

    FLOP are those of the model (Chowdhery et al. 2022, B): what is computed a second time to save
    memory does not count.
    """
    rates = {"flop_per_s": flop_per_s}
    if peak_tflops is not None:
        rates["flop_utilisation"] = flop_per_s / (num_processes * peak_tflops * 1e12)
    return rates
