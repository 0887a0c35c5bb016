"""The hot path's arms tokenise the same requests, and the workload is what it says."""

from rankonce.benchmarks.hot_path import HotPathOptions, _Tokeniser, make_requests, measure_hot_path


def test_the_workload_is_as_long_as_it_says() -> None:
    options = HotPathOptions(num_requests=2, num_candidates=7)
    requests = make_requests(options)
    assert requests == make_requests(options)
    rendered = _Tokeniser(options.tokenizer, cached=False).tokenise(requests[0])
    assert len(rendered.tokens.segment_ids) == 7
    assert 0.8 < len(rendered.tokens.prefix_ids) / options.prefix_tokens < 1.3
    cached = _Tokeniser(options.tokenizer, cached=True)
    assert [cached.tokenise(requests[0]).tokens for _ in range(2)] == [rendered.tokens] * 2


def test_every_arm_is_measured() -> None:
    options = HotPathOptions(num_requests=2, num_candidates=3, prefix_tokens=100, rounds=1)
    heard: list[str] = []
    record = measure_hot_path(options, on_arm=heard.append)
    assert len(record["tokenising"]) == 12
    assert all(arm["requests_per_s"] > 0 for arm in record["tokenising"].values())
    assert record["reading_ms"]["checking alone"] < record["reading_ms"]["json"] * 1.5
    assert {"json", "pydantic_core"} <= record["writing_ms"].keys()
    assert heard
