"""The timing of int8: every size is measured in turns, recorded and shown."""

import json
from pathlib import Path

from rankonce.benchmarks.quantization import (
    QuantizationBenchmark,
    describe_quantization,
    measure_quantization,
)


def test_every_size_is_timed_in_both_arms(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    output = tmp_path / "folder" / "record.json"
    options = QuantizationBenchmark(
        sizes=("0.07m", "0.16m"), prefix_tokens=35, num_candidates=3, candidate_tokens=5, rounds=2,
        output=output,
    )  # fmt: skip
    record = measure_quantization(options, on_pass=lambda *given: heard.append(given))
    assert heard == [(size, done, 6) for size in options.sizes for done in range(1, 7)]
    assert json.loads(output.read_text()) == record
    assert record["command"] == ("rankonce bench quantization --size 0.07m --size 0.16m --rounds 2")
    for one in record["sizes"].values():
        fp32, int8 = (one["wall_ms"][arm] for arm in ("fp32", "cpu-int8"))
        assert len(fp32) == len(int8) == 2
        ratios = sorted(a / b for a, b in zip(fp32, int8, strict=True))
        assert one["speedup"] == (ratios[0] + ratios[1]) / 2
    assert f"| 0.16m | {sum(record['sizes']['0.16m']['wall_ms']['fp32']) / 2:,.0f} |" in (
        describe_quantization(record)
    )
