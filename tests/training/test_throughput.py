"""FLOP/s and their share of the peak."""

import pytest
import torch

from rankonce.training import throughput as module
from rankonce.training.throughput import known_peak_tflops, throughput


def test_utilisation_is_a_share_of_what_all_devices_can_do() -> None:
    rates = throughput(8e14, 2, 1000.0)
    assert rates == {"flop_per_s": 8e14, "flop_utilisation": pytest.approx(0.4)}
    assert throughput(8e14, 2, None) == {"flop_per_s": 8e14}


def test_a_processor_has_no_known_peak() -> None:
    assert known_peak_tflops(torch.device("cpu"), "fp32") is None


def test_peaks_are_found_by_chip_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA A100-SXM4-40GB": 312.0, "Tesla T4": None}
    for name, peak in names.items():
        monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda _, name=name: name)
        assert known_peak_tflops(torch.device("cuda"), "bf16") == peak
