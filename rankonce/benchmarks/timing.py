"""Times of calls, the deadline of a run, and the ceilings of the chip.

On a GPU ``median_ms`` is ``triton.testing.do_bench``: medians with the L2 cache flushed before
every call. It counts the gaps of a host that launches slower than the device computes;
``device_ms`` holds the device back until all launches are queued, as a captured graph would.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankonce.benchmarks.roofline import Ceilings

# Calls slower than this are timed a few times only; do_bench alone would make eight calls.
_SLOW_MS = 250.0
# Larger than the L2 cache of any GPU.
_FLUSH_BYTES = 256 * 2**20
# Cycles for which the device is held back, about a quarter of a millisecond.
_HOLD_CYCLES = 500_000
_FP8_LARGEST = 448.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one call.

    Attributes:
        median_ms: over all runs; p20_ms and p80_ms are the quantiles beside it.
        device_ms: median with the launches queued ahead; ``None`` where there is no queue.
        num_runs: timed runs, where we counted them ourselves.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    device_ms: float | None = None
    num_runs: int | None = None


class Deadline:
    """The end of a run.

    Args:
        seconds: from now.
        clock: for tests.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end - self._clock()


def time_call(call: Callable[[], Any], device: str, *, queued: bool = False) -> Timing:
    """Time a call that has been run before.

    Args:
        call: computes on ``device``.
        queued: also measure ``device_ms``.
    """
    if not device.startswith("cuda"):
        return _time_on_host(call, runs=5)
    once_ms = _event_ms(call)
    if once_ms > _SLOW_MS:
        runs = 5 if once_ms < 1000 else 3 if once_ms < 3000 else 1
        times = [_event_ms(call) for _ in range(runs)]
        return _summary([*times, once_ms] if runs == 1 else times, None)
    from triton.testing import do_bench

    # At least ten runs of a whole pass, too.
    rep_ms = int(max(100.0, 10 * once_ms))
    # do_bench gives the quantiles that it is asked for in their order.
    median, low, high = do_bench(
        call, warmup=20, rep=rep_ms, quantiles=[0.5, 0.2, 0.8], return_mode="median"
    )
    device_ms = _queued_ms(call, max(5, min(50, int(60 / max(once_ms, 0.01))))) if queued else None
    return Timing(median_ms=median, p20_ms=low, p80_ms=high, device_ms=device_ms)


def _time_on_host(call: Callable[[], Any], *, runs: int) -> Timing:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return _summary(times, None)


def _summary(times: list[float], device_ms: float | None) -> Timing:
    ordered = sorted(times)
    return Timing(
        median_ms=statistics.median(ordered),
        p20_ms=ordered[int(0.2 * (len(ordered) - 1))],
        p80_ms=ordered[-1 - int(0.2 * (len(ordered) - 1))],
        device_ms=device_ms,
        num_runs=len(ordered),
    )


def _event_ms(call: Callable[[], Any]) -> float:
    """Time one call with a cold L2."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _queued_ms(call: Callable[[], Any], runs: int) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(_HOLD_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times)


def quantize_rowwise(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row to FP8 and return it with its scales, M x 1."""
    largest_M1 = x_MD.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12)
    scale_M1 = largest_M1 / _FP8_LARGEST
    return (x_MD.float() / scale_M1).to(torch.float8_e4m3fn), scale_M1


def scaled_mm(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
    """Multiply rows by the rows of a weight, both with one scale a row, by ``_scaled_mm``."""
    out: Tensor = torch._scaled_mm(
        x[0],
        weight[0].t(),
        scale_a=x[1],
        scale_b=weight[1].t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out


def measure_ceilings(device: str, dtype: torch.dtype, *, small: bool = False) -> Ceilings:
    """Measure dense products and a copy of random numbers."""
    on_gpu = device.startswith("cuda")
    size = 512 if small or not on_gpu else 8192
    count = 2**22 if small or not on_gpu else 2**30
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flop = 2.0 * size**3
    a @ b
    matmul_ms = time_call(lambda: a @ b, device).median_ms
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = time_call(lambda: target.copy_(source), device).median_ms
    return Ceilings(
        matmul_tflops=flop / matmul_ms / 1e9,
        fp8_tflops=_fp8_tflops(a, b) if on_gpu else None,
        copy_tb_s=2.0 * count / copy_ms / 1e9,
    )


def _fp8_tflops(a_MD: Tensor, b_ND: Tensor) -> float | None:
    left, right = quantize_rowwise(a_MD), quantize_rowwise(b_ND)
    try:
        scaled_mm(left, right)
    except RuntimeError as error:  # chips before Ada, and builds without the kernel
        print(f"no FP8 ceiling: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    flop = 2.0 * a_MD.shape[0] * b_ND.shape[0] * a_MD.shape[1]
    return flop / time_call(lambda: scaled_mm(left, right), "cuda").median_ms / 1e9
