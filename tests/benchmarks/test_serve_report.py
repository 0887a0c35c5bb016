from typing import Any

from rankonce.benchmarks.serve_report import describe_serving


def _arm(name: str, capacity: float, *, alone: float) -> dict[str, Any]:
    step = {
        "rate": capacity / 100,
        "num_requests": 30,
        "num_answered": 30,
        "p50_ms": 100.0,
        "p90_ms": 500.0,
        "p99_ms": 900.0,
    }
    return {
        "arm": name,
        "server": name.split()[0],
        "workload": "member",
        "greatest_difference": 1e-7,
        "alone_ms": 1e5 / alone,
        "alone_candidates_per_s": alone,
        "memory_mb": 500.0,
        "steps": [step] if capacity else [],
        "capacity_requests_per_s": capacity / 100,
        "capacity_candidates_per_s": capacity,
    }


def _record(*arms: dict[str, Any]) -> dict[str, Any]:
    return {
        "environment": {"processor": "a processor", "usable_cores": 2, "commit": "abc"},
        "settings": {
            "bound_ms": 1000.0,
            "threads": 2,
            "model": "embedded",
            "servers": {"rankonce": {"version": "rankonce 0.1.0"}},
        },
        "workloads": {
            "member": {
                "prefix_tokens": 2048,
                "num_candidates": 100,
                "candidate_tokens": 64,
                "has_task": True,
            }
        },
        "arms": list(arms),
    }


def capacity_record() -> dict[str, Any]:
    """A record in which ours is 3.5 times vLLM and 7 times plain transformers."""
    return _record(
        _arm("rankonce rank", 700.0, alone=400.0),
        _arm("rankonce score", 500.0, alone=300.0),
        _arm("vllm", 200.0, alone=150.0),
        _arm("transformers", 100.0, alone=50.0),
    )


def test_bars_compare_the_best_form_of_ours_with_each_server() -> None:
    text = describe_serving(capacity_record())
    assert "- member, vllm: 3.50× at equal p99; the bar of 3× is met" in text
    assert "- member, transformers: 7.00× at equal p99; the bar of 10× is missed" in text
    assert "| rankonce rank | 250 | 400 | 700 | 100, 500, 900 | 500 | 1e-07 |" in text


def test_a_server_without_a_capacity_is_compared_by_what_it_does_alone() -> None:
    text = describe_serving(
        _record(_arm("rankonce rank", 700.0, alone=400.0), _arm("transformers", 0.0, alone=10.0))
    )
    assert "- member, transformers: 70.00× of what it does one request at a time" in text
    assert "10000 ms each; the bar of 10× is met" in text
    assert "- member, vllm: not measured" in text
    assert "| transformers | 10000 | 10 | at no rate |" in text
