"""Adapters over one backbone: chosen per request, one at a time, the house law under each."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankonce.errors import ModelError, RequestError
from rankonce.layout import TokenizedRequest
from rankonce.model.adapters import fingerprint_base, is_adapter
from rankonce.model.execution import PassRunner
from rankonce.model.precision import PRECISIONS, loading_options, settle_4bit_layers
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import ScoreRequest, ScoreResult
from rankonce.training.adapters import AdapterConfig, load_network
from tests.conftest import ARCHITECTURES, build_network, build_request, build_tokenizer
from tests.training.test_adapters import disturb

ALL = ("films", "jobs", "")


def build_base(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    build_network(architecture, **options).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_adapter(base: Path, folder: Path, *, seed: int, tasks: tuple[str, ...] = ()) -> Path:
    config = AdapterConfig(rank=4, targets=("q_proj", "v_proj") if seed == 2 else None)
    network = load_network(base, config, base=str(base))
    disturb(network, seed=seed)
    network.save_pretrained(folder)
    record = {"base": fingerprint_base(str(base)), "tasks": dict.fromkeys(tasks, "")}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def build_both(base: Path) -> dict[str, Path]:
    """Make two adapters, of which one leaves a part of the layers alone."""
    tasks = {"films": "movie-like", "jobs": "job-apply"}
    return {
        name: build_adapter(base, base.parent / name, seed=seed, tasks=(task,))
        for seed, (name, task) in enumerate(tasks.items(), start=1)
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return build_both(base)


@pytest.fixture(scope="module")
def ranker(base: Path, adapters: Mapping[str, Path]) -> Ranker:
    return Ranker.from_pretrained(base, device="cpu", adapters=adapters)


def with_adapter(request: ScoreRequest, name: str | None) -> ScoreRequest:
    return replace(request, adapter=name)


def values(result: ScoreResult) -> torch.Tensor:
    return torch.tensor([list(one.log_probs.values()) for one in result.candidates])


def differ(first: ScoreResult, second: ScoreResult) -> float:
    return float((values(first) - values(second)).abs().max())


def plain_scores(
    base: Path,
    adapter: Path | None,
    ranker: Ranker,
    request: ScoreRequest,
) -> Any:
    """Score with plain transformers and PEFT, one prompt per candidate."""
    network = plain_network(base, adapter, precision="fp32")
    return score_plainly(network, ranker.prepare(request).rendered.tokens)


def plain_network(base: Path, adapter: Path | None, *, precision: str) -> Any:
    options = loading_options(PRECISIONS[precision], "cpu")
    network: Any = AutoModelForCausalLM.from_pretrained(base, **options)
    if precision == "nf4":
        settle_4bit_layers(network)
    return network if adapter is None else PeftModel.from_pretrained(network, adapter)


@torch.no_grad()
def score_plainly(network: Any, tokens: TokenizedRequest, *, noise: int | None = None) -> Any:
    """Score one prompt per candidate.

    Args:
        noise: changes the last bits of the embeddings, the prefix's the same for all candidates.
    """
    embed, rows = network.get_input_embeddings(), []
    for segment in tokens.segment_ids:
        hidden = embed(torch.tensor([[*tokens.prefix_ids, *segment]]))
        if noise is not None:
            generator = torch.Generator().manual_seed(noise)
            hidden = hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=generator))
        logits = network(inputs_embeds=hidden).logits[0, -1]
        rows.append(logits[[ids[0] for ids in tokens.label_ids]].float().log_softmax(0))
    return torch.stack(rows)


def assert_layers_alike(ours: Any, plain: Any, tokens: TokenizedRequest) -> None:
    """Give each linear layer of ours what its plain one was given; both should say the same."""
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name, layer in plain.named_modules():
        if name.endswith("_proj"):
            layer.register_forward_hook(
                lambda _, given, said, name=name: seen.append((name, given[0], said))
            )
    score_plainly(plain, tokens)
    assert len(seen) == 7 * plain.config.num_hidden_layers * len(tokens.segment_ids)
    for name, given, said in seen:
        layer = ours.get_submodule(name.removeprefix("base_model.model."))
        with torch.no_grad():
            torch.testing.assert_close(layer(given), said, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mixtral"])
def test_each_adapter_scores_as_plain_peft_on_separate_prompts(
    tmp_path: Path, architecture: str
) -> None:
    base = build_base(tmp_path / "base", architecture)
    folders = build_both(base)
    ranker = Ranker.from_pretrained(base, device="cpu", adapters=folders)
    scores = {}
    for name in ALL:
        request = with_adapter(build_request(7, seed=3), name)
        expected = plain_scores(base, folders.get(name), ranker, request)
        scores[name] = values(ranker.score(request))
        torch.testing.assert_close(scores[name], expected, atol=1e-5, rtol=0)
    assert (scores["films"] - scores["jobs"]).abs().max() > 0.05
    assert (scores["films"] - scores[""]).abs().max() > 0.05


def test_experts_stay_as_they_are_and_attention_is_adapted(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "mixtral")
    folder = build_adapter(base, tmp_path / "films", seed=1)
    trained = load_network(folder, AdapterConfig(rank=4), base=str(base)).eval()
    ids = torch.arange(5, 25)[None]
    network = load_network(base, AdapterConfig(rank=4), base=str(base)).eval()
    disturb(network, seed=1)
    torch.testing.assert_close(trained(ids).logits, network(ids).logits)


def test_requests_of_many_adapters_score_as_each_alone(
    base: Path, adapters: Mapping[str, Path], ranker: Ranker
) -> None:
    requests = [
        with_adapter(build_request(5 + seed, seed=seed), ALL[seed % 3]) for seed in range(7)
    ]
    together = list(ranker.score_many(requests, progress=False))
    assert [result.adapter for result in together] == [r.adapter or None for r in requests]
    for request, result in zip(requests, together, strict=True):
        alone = Ranker.from_pretrained(base, device="cpu", adapters=adapters).score(request)
        assert differ(alone, result) <= 1e-5
        single = replace(request, candidates=request.candidates[2:3])
        assert (values(ranker.score(single)) - values(result)[2]).abs().max() <= 1e-5


def test_the_backbone_of_adapters_scores_as_the_checkpoint(base: Path, ranker: Ranker) -> None:
    request = build_request(9)
    ranker.score(with_adapter(request, "films"))
    expected = Ranker.from_pretrained(base, device="cpu").score(request)
    assert differ(ranker.score(with_adapter(request, "")), expected) <= 1e-5
    assert expected.adapter is None


def test_a_prefix_cached_under_one_adapter_is_never_read_under_another(
    base: Path, adapters: Mapping[str, Path]
) -> None:
    ranker = Ranker.from_pretrained(base, device="cpu", adapters=adapters)
    request = build_request(4)
    first = {name: ranker.score(with_adapter(request, name)) for name in ALL}
    assert [result.usage.cached_tokens for result in first.values()] == [0, 0, 0]
    again = {name: ranker.score(with_adapter(request, name)) for name in ALL}
    assert all(result.usage.cached_tokens > 0 for result in again.values())
    assert max(differ(first[name], again[name]) for name in ALL) <= 1e-5


def test_a_recorded_pass_of_one_adapter_is_never_replayed_for_another(
    base: Path, adapters: Mapping[str, Path]
) -> None:
    # A prefix that is known makes another pass, which is recorded for itself.
    config = RankerConfig(prefix_cache_mb=0)
    ranker = Ranker.from_pretrained(base, device="cpu", adapters=adapters, config=config)
    # Recording on a CPU: the work is run again over the same buffers, as a CUDA graph does, with
    # the adapter that was in use then.
    recorded: list[str | None] = []

    def capture(run: Any) -> Any:
        name = ranker.model.adapters.active
        recorded.append(name)
        run()

        def replay() -> None:
            now = ranker.model.adapters.active
            ranker.model.adapters.use(name)
            run()
            ranker.model.adapters.use(now)

        return replay

    ranker.scorer.runner = PassRunner(
        ranker.model.network, ranker.model.table_keys, max_graph_tokens=4096, capture=capture
    )
    plain = Ranker.from_pretrained(base, device="cpu", adapters=adapters)
    for name in (*ALL, *ALL):
        request = with_adapter(build_request(6), name)
        assert differ(ranker.score(request), plain.score(request)) <= 1e-5
    assert recorded == ["films", "jobs", None]


def test_passes_with_adapters_can_be_recorded(ranker: Ranker) -> None:
    assert ranker.model.acceleration.is_complete


def test_the_adapter_that_learnt_the_task_scores_unless_the_request_says_otherwise(
    ranker: Ranker,
) -> None:
    request = build_request(3)
    assert ranker.score(request).adapter == "films"
    assert differ(ranker.score(request), ranker.score(with_adapter(request, "films"))) <= 1e-5
    assert ranker.score(with_adapter(request, "jobs")).adapter == "jobs"
    assert ranker.score(with_adapter(request, "")).adapter is None
    assert ranker.choose_adapter(None, task="song-like") is None
    assert ranker.choose_adapter(None, task="job-apply") == "jobs"


def test_an_unknown_adapter_is_refused_with_those_there_are(base: Path, ranker: Ranker) -> None:
    with pytest.raises(RequestError, match="adapter: should be one of films, jobs, is 'songs'"):
        ranker.score(with_adapter(build_request(3), "songs"))
    plain = Ranker.from_pretrained(base, device="cpu")
    with pytest.raises(RequestError, match="adapter: should be left out, since none is loaded"):
        plain.score(with_adapter(build_request(3), "films"))


def test_two_adapters_that_learnt_a_task_must_be_told_apart(base: Path, tmp_path: Path) -> None:
    folders = {
        name: build_adapter(base, tmp_path / name, seed=seed, tasks=("movie-like",))
        for seed, name in enumerate(("old", "new"))
    }
    ranker = Ranker.from_pretrained(base, device="cpu", adapters=folders)
    with pytest.raises(RequestError, match="adapter: should be given: old, new learnt movie-like"):
        ranker.score(build_request(3))


def test_the_folder_of_an_adapter_loads_its_backbone(
    adapters: Mapping[str, Path], ranker: Ranker
) -> None:
    request = build_request(5)
    alone = Ranker.from_pretrained(adapters["jobs"], device="cpu")
    assert differ(alone.score(request), ranker.score(with_adapter(request, "jobs"))) <= 1e-5
    config = RankerConfig(adapter="jobs")
    chosen = Ranker(ranker.model, config=config).score(request)
    assert chosen.adapter == "jobs"


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_adapters_score_as_plain_peft_over_a_backbone_of_the_same_precision(
    tmp_path: Path, precision: str
) -> None:
    base = build_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    folders = build_both(base)
    request = build_request(4)
    coarse = Ranker.from_pretrained(base, device="cpu", adapters=folders, precision=precision)
    tokens = coarse.prepare(request).rendered.tokens
    plain = {}
    for name in ALL:
        network = plain_network(base, folders.get(name), precision=precision)
        plain[name] = score_plainly(network, tokens)
        found = values(coarse.score(with_adapter(request, name)))
        if precision == "bf16":
            # Sums of another order round otherwise: what plain bf16 is off by is the measure.
            exact = plain_scores(base, folders.get(name), coarse, request)
            error = float((plain[name] - exact).abs().max())
            assert float((found - exact).abs().max()) <= 2 * error
        elif precision == "int8":
            # 8 bits round the inputs as well, where one between two steps may take either: layers
            # agree exactly, and scores as far as plain ones do whose last bits are changed.
            spread = max(
                float((score_plainly(network, tokens, noise=seed) - plain[name]).abs().max())
                for seed in range(16)
            )
            assert float((found - plain[name]).abs().max()) <= spread < 0.1
            assert_layers_alike(coarse.model.network, network, tokens)
        else:
            torch.testing.assert_close(found, plain[name], atol=1e-5, rtol=0)
    for one, other in combinations(ALL, 2):
        assert float((plain[one] - plain[other]).abs().max()) > 1
    with pytest.raises(ModelError, match="precision: fp8 and cpu-int8 take no adapters"):
        Ranker.from_pretrained(base, device="cpu", adapters=folders, precision="fp8")


def test_a_name_may_be_a_part_of_a_modules_path(base: Path, adapters: Mapping[str, Path]) -> None:
    names = {"mlp": adapters["films"], "m": adapters["jobs"]}
    ranker = Ranker.from_pretrained(base, device="cpu", adapters=names)
    request = build_request(3)
    scores = [ranker.score(with_adapter(request, name)) for name in names]
    assert differ(*scores) > 0.05
    with pytest.raises(ModelError, match="adapter: a name should be of letters"):
        Ranker.from_pretrained(base, device="cpu", adapters={"a.b": adapters["films"]})


def test_files_that_do_not_belong_are_refused(
    base: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    def load(folder: Path, over: Path = base) -> None:
        Ranker.from_pretrained(over, device="cpu", adapters={"films": folder})

    assert is_adapter(adapters["films"])
    assert not is_adapter(base)
    with pytest.raises(ModelError, match=r"adapter: .* has no adapter_config\.json"):
        load(base)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(
        (adapters["films"] / "adapter_config.json").read_text()
    )
    with pytest.raises(ModelError, match=r"adapter: .* has no adapter_model\.safetensors"):
        load(broken)
    weights = load_file(adapters["films"] / "adapter_model.safetensors")
    lost = min(weights)
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        broken / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=rf"lacks {lost.removeprefix('base_model.model.')}"):
        load(broken)
    save_file({**weights, "other": weights[lost].clone()}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has a weight that no layer takes: other"):
        load(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is broken"):
        load(broken)
    other = build_base(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"whose weights are not those of .*other"):
        load(adapters["films"], other)
    wide = build_base(tmp_path / "wide", hidden_size=64)
    (adapters["films"] / "run.json").rename(tmp_path / "run.json")
    with pytest.raises(ModelError, match=r"does not fit LlamaForCausalLM: .*size mismatch"):
        load(adapters["films"], wide)
    (tmp_path / "run.json").rename(adapters["films"] / "run.json")


def test_an_adapter_of_the_head_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="changes the head or the embeddings"):
        load_network(base, AdapterConfig(targets=("q_proj", "lm_head")), base=str(base))
    network = build_network("llama")
    network.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), "head")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        network.save_pretrained(tmp_path / "head")
    with pytest.raises(ModelError, match="changes the head or the embeddings"):
        Ranker.from_pretrained(base, device="cpu", adapters={"head": tmp_path / "head"})


def test_the_fingerprint_sees_weights_and_neither_formats_nor_shards(
    base: Path, tmp_path: Path
) -> None:
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    network.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint_base(str(tmp_path / "shards")) == fingerprint_base(str(base))
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[0, 3] += 1e-3
    network.save_pretrained(tmp_path / "changed")
    assert fingerprint_base(str(tmp_path / "changed")) != fingerprint_base(str(base))
    with pytest.raises(ModelError, match=r"model: .*nowhere cannot be loaded"):
        fingerprint_base(str(tmp_path / "nowhere"))
