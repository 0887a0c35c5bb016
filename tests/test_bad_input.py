"""Bad input is a clear error that names the field: never a traceback, never a silent answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rankonce.errors import (
    LabelError,
    ModelError,
    NumericsError,
    PromptTooLongError,
    RankOnceError,
    RequestError,
    TaskError,
)
from rankonce.model.loading import LoadedModel
from rankonce.prompts.tasks import library_tasks
from rankonce.ranker import Ranker
from rankonce.records import Event, Item, ScoreRequest, read_request
from tests.conftest import build_network, build_tokenizer

GOOD: dict[str, Any] = {
    "task": "movie-like",
    "time": 1_000_000_000,
    "history": [{"item": {"fields": {"title": "Up"}}, "action": "liked", "time": 999_000_000}],
    "candidates": [{"id": "a", "fields": {"title": "Heat"}}],
}
Load = Callable[..., LoadedModel]


def changed(*path: str | int, value: Any) -> Any:
    """Return the good request with another value at a path; ``...`` takes the entry away."""
    data = json.loads(json.dumps(GOOD))
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


FILM = {"fields": {"title": "Up"}}
FIELDS = ("candidates", 0, "fields")
NAN, INFINITY = float("nan"), float("inf")
REQUESTS: list[tuple[Any, str]] = [
    ([], "request: Input should be a dictionary"),
    ("Heat", "request: Input should be a dictionary"),
    (None, "request: Input should be a dictionary"),
    (changed("task", value=...), "task: Field required"),
    (changed("task", value=7), "task: Input should be a valid string"),
    (changed("task", value="song-skip"), "task: no task is called 'song-skip'"),
    (changed("top_k", value=3), "top_k: unknown field"),
    (changed("candidates", value=...), "candidates: Field required"),
    (changed("candidates", value=[]), "candidates: should hold at least one candidate"),
    (changed("candidates", value="Heat"), "candidates: Input should be a valid tuple"),
    (changed("candidates", 0, value="Heat"), "candidates[0]: Input should be a dictionary"),
    (changed("candidates", 0, "title", value="Heat"), "candidates[0].title: unknown field"),
    (changed(*FIELDS, value=...), "candidates[0].fields: Field required"),
    (changed(*FIELDS, "title", value=...), "candidates[0].fields.title: is required and missing"),
    (changed(*FIELDS, "title", value=None), "candidates[0].fields.title: is required and missing"),
    (changed(*FIELDS, "title", value=""), "candidates[0].fields.title: should be text, is empty"),
    (changed(*FIELDS, "title", value=["a"]), "candidates[0].fields.title: should be text, is list"),
    (changed(*FIELDS, "title", value=True), "candidates[0].fields.title: should be text, is bool"),
    (changed(*FIELDS, "title", value={}), "candidates[0].fields.title: should be text, a number"),
    (
        changed(*FIELDS, "title", value="\ud800"),
        "candidates[0].fields.title: should be text, holds",
    ),
    (changed(*FIELDS, "title", value=NAN), "candidates[0].fields.title: should be a finite number"),
    (changed(*FIELDS, "genres", value=[1]), "candidates[0].fields.genres: should be text"),
    (changed(*FIELDS, "year", value=1995), "candidates[0].fields.year: unknown field"),
    (changed(*FIELDS, "like_share", value=2), "candidates[0].fields.like_share: should lie"),
    (
        changed(*FIELDS, "like_share", value=INFINITY),
        "candidates[0].fields.like_share: should be a",
    ),
    (changed(*FIELDS, "num_raters", value="many"), "candidates[0].fields.num_raters: should be a"),
    (changed(*FIELDS, "num_raters", value=10**400), "candidates[0].fields.num_raters: should be a"),
    (
        changed("profile", value={"age": 3}),
        "profile.age: unknown field; the task knows num_ratings",
    ),
    (changed("time", value="yesterday"), "time: should be Unix seconds or an ISO 8601 time"),
    (changed("time", value="1612011200000"), "time: should be Unix seconds or an ISO 8601 time"),
    (changed("time", value="20240517T1800"), "time: should be Unix seconds or an ISO 8601 time"),
    (changed("time", value=NAN), "time: Input should be a finite number"),
    (changed("time", value=True), "time: should be Unix seconds"),
    (changed("history", value={}), "history: Input should be a valid tuple"),
    (changed("history", 0, "time", value=...), "history[0].time: Field required"),
    (changed("history", 0, "time", value=INFINITY), "history[0].time: Input should be a finite"),
    (
        changed("history", 0, "time", value=2e9),
        "history[0].time: lies after the time of the request",
    ),
    (changed("history", 0, "action", value=...), "history[0].action: Field required"),
    (
        changed("history", 0, "action", value="ate"),
        "history[0].action: should be one of liked, dis",
    ),
    (changed("history", 0, "item", value=...), "history[0].item: Field required"),
    (
        changed("history", 0, "item", value={"fields": {}}),
        "history[0].item.fields.title: is required",
    ),
    (changed("examples", value={}), "examples: Input should be a valid tuple"),
    (changed("examples", value=[{"label": "Yes"}]), "examples[0].item: Field required"),
    (changed("examples", value=[{"item": FILM}]), "examples[0].label: Field required"),
    (changed("examples", value=[{"item": FILM, "label": 1}]), "examples[0].label: Input should be"),
    (
        changed("examples", value=[{"item": FILM, "label": "Yes"}, {"item": FILM, "label": "yes"}]),
        "examples[1].label: should be one of Yes, No, is 'yes'",
    ),
    (
        changed("examples", value=[{"item": {"fields": {}}, "label": "No"}]),
        "examples[0].item.fields.title: is required and missing",
    ),
    (
        changed("examples", value=[{"item": {"fields": {"tone": "dark"}}, "label": "No"}]),
        "examples[0].item.fields.tone: unknown field",
    ),
]


@pytest.fixture(scope="module")
def ranker(load_random: Load) -> Ranker:
    return Ranker(load_random("llama"))


def test_the_good_request_is_scored(ranker: Ranker) -> None:
    assert ranker.score(read_request(GOOD)).candidates[0].rank == 1


@pytest.mark.parametrize(("data", "message"), REQUESTS)
def test_a_fault_in_a_request_is_told_with_its_field(
    ranker: Ranker, data: Any, message: str
) -> None:
    with pytest.raises((RequestError, TaskError)) as caught:
        ranker.score(read_request(data))
    assert str(caught.value).startswith(message)


HEAT = Item(fields={"title": "Heat"})


def made(*candidates: Item, time: float | None = 5, event_time: float = 1) -> ScoreRequest:
    """Make a request in Python, which checks no type."""
    event = Event(item=HEAT, action="liked", time=event_time)
    return ScoreRequest(task="movie-like", candidates=candidates, history=(event,), time=time)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (made(), "candidates: should hold at least one candidate"),
        (made(HEAT, event_time=None), "history[0].time: Input"),  # type: ignore[arg-type]
        (made(HEAT, event_time=NAN), "history[0].time: Input should be a finite number"),
        (made(HEAT, time=NAN), "time: Input should be a finite number"),
        (made(Item(fields={"title": "\ud800"})), "candidates[0].fields.title: should be text, hol"),
        (made(HEAT, Item(fields={"title": {}})), "candidates[1].fields.title: should be text, a"),
        (made("Heat"), "candidates[0]: Input"),  # type: ignore[arg-type]
    ],
)
def test_a_request_made_in_python_is_checked_as_json_is(
    ranker: Ranker, request_: ScoreRequest, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ranker.prepare(request_)
    assert str(caught.value).startswith(message)


def test_a_tuple_of_texts_is_read_as_a_list(ranker: Ranker) -> None:
    genres = ("Action", "Drama")
    rendered = ranker.prepare(made(Item(fields={"title": "Up", "genres": genres}))).rendered
    assert rendered.segments[0].startswith("Film: Up · Action, Drama")


def test_an_action_without_a_word_is_refused(ranker: Ranker) -> None:
    data = changed("history", 0, "action", value=" ")
    data |= {"task": "similar-item", "profile": {"source_title": "Up"}}
    with pytest.raises(RequestError, match=r"^history\[0\]\.action: should be text, is empty"):
        ranker.score(read_request(data))


def test_a_blank_text_counts_as_missing_where_another_field_stands_in(ranker: Ranker) -> None:
    def prefix(profile: dict[str, str]) -> str:
        data = {"task": "similar-item", "profile": profile, "candidates": GOOD["candidates"]}
        return ranker.prepare(read_request(data)).rendered.prefix

    without = prefix({"source_title": "Up"})
    assert prefix({"source_title": "Up", "query": ""}) == without
    assert prefix({"source_title": "Up", "query": "\n "}) == without
    assert prefix({"source_title": "Up", "query": "balloon"}) != without


def test_all_faults_of_a_request_are_told_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        read_request({"candidates": [{"fields": {}, "id": 3}], "history": [{}], "colour": 1})
    fields = [fault.split(":")[0] for fault in str(caught.value).split("; ")]
    assert fields == ["task", "candidates[0].id", "history[0].item", "history[0].action",
                      "history[0].time", "colour"]  # fmt: skip


def test_a_task_that_says_ages_needs_the_time_of_the_request(ranker: Ranker) -> None:
    data = changed("time", value=...)
    data |= {"task": "movie-rating"}
    data["history"][0]["action"] = "5 stars"
    with pytest.raises(RequestError, match=r"^time: task 'movie-rating' says how long ago"):
        ranker.score(read_request(data))


def test_a_prompt_longer_than_the_model_is_refused(ranker: Ranker) -> None:
    data = changed("candidates", value=[{"fields": {"title": t}} for t in ("M", "long " * 3000)])
    with pytest.raises(PromptTooLongError, match=r"candidates\[1\]: .* the model takes 4096"):
        ranker.score(read_request(data))


def test_a_prompt_longer_than_a_window_of_the_mask_alone_is_refused(tmp_path: Path) -> None:
    network = build_network("phimoe", sliding_window=32, num_local_experts=4)
    ranker = Ranker.from_pretrained(save(tmp_path, network))
    with pytest.raises(PromptTooLongError, match=r"candidates\[0\]: .* the model takes 32"):
        ranker.score(read_request(GOOD))


def test_a_label_that_is_not_one_token_is_refused(load_random: Load) -> None:
    task = library_tasks()["movie-like"].model_dump()
    task |= {"name": "perhaps", "labels": [{"name": "Yes"}, {"name": "Perhaps"}]}
    task = type(library_tasks()["movie-like"]).model_validate(task)
    ranker = Ranker(load_random("llama"), tasks=[task])
    with pytest.raises(LabelError, match=r"' Perhaps' of task 'perhaps' should be one token, but"):
        ranker.score(read_request({**GOOD, "task": "perhaps"}))


def save(folder: Path, network: Any, *, tokenizer: bool = True) -> Path:
    network.save_pretrained(folder)
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder


def causal(architecture: str, **shape: Any) -> Any:
    config = AutoConfig.for_model(architecture, vocab_size=640, **shape)
    return AutoModelForCausalLM.from_config(config)


BERT = {
    "vocab_size": 640,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=640, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "is T5ForConditionalGeneration; should be a decoder-only language model",
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        "is BertForMaskedLM; should be a decoder-only language model",
    ),
    "bert with a head for language": (
        lambda: BertLMHeadModel(BertConfig(**BERT)),
        "Bert.* is not plain causal attention",
    ),
    "no head": (lambda: build_network("llama").model, "is LlamaModel; should be a decoder-only"),
    "state": (
        lambda: causal("mamba", hidden_size=16, num_hidden_layers=2, state_size=4),
        "MambaForCausalLM: does not take transformers' attention interface",
    ),
    "state between attention": (
        lambda: causal("recurrent_gemma", hidden_size=16, num_hidden_layers=3, lru_width=16,
                       num_attention_heads=2, intermediate_size=16),
        "RecurrentGemmaForCausalLM: 1 of 3 layers are attention; the others would carry",
    ),
    "attention of its own": (
        lambda: causal("bloom", hidden_size=16, n_layer=2, n_head=2),
        "BloomForCausalLM: does not take transformers' attention interface",
    ),
    "sinks": (
        lambda: causal("gpt_oss", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, head_dim=8, intermediate_size=16,
                       num_local_experts=2, num_experts_per_tok=1),
        "GptOssAttention: is not plain causal attention",
    ),
    "a head that scales": (
        lambda: causal("granite", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, intermediate_size=16, logits_scaling=8.0),
        "GraniteForCausalLM: packed and separate logits differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoint_that_cannot_run_packed_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    build, message = NETWORKS[kind]
    with pytest.raises(ModelError, match=message):
        Ranker.from_pretrained(save(tmp_path, build()))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model", build_network("llama"))


def test_a_folder_without_a_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").unlink()
    for folder in (checkpoint, tmp_path):
        with pytest.raises(ModelError, match=f"model: {folder} has no config.json"):
            Ranker.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "abacus"}'])
def test_a_broken_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"model: {checkpoint} cannot be loaded: ..."):
        Ranker.from_pretrained(checkpoint)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, build_network("llama"), tokenizer=False)
    with pytest.raises(ModelError, match=f"tokenizer: {tmp_path} has none that can be loaded"):
        Ranker.from_pretrained(tmp_path)


def test_a_broken_tokenizer_is_refused(checkpoint: Path) -> None:
    content = (checkpoint / "tokenizer.json").read_bytes()
    (checkpoint / "tokenizer.json").write_bytes(content[:1000])
    with pytest.raises(ModelError, match=f"tokenizer: {checkpoint} has none that can be loaded"):
        Ranker.from_pretrained(checkpoint)


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model: .* cannot be loaded: .*model\.safetensors"):
        Ranker.from_pretrained(checkpoint)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(checkpoint: Path, num_bytes: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=r"model: .* a safetensors file is broken"):
        Ranker.from_pretrained(checkpoint)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_weights_that_a_checkpoint_lacks_are_named(checkpoint: Path) -> None:
    # transformers would go on with random ones.
    rewrite(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj"):
        Ranker.from_pretrained(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda weights: weights.update({"lm_head.weight": torch.zeros(640, 8)}))
    with pytest.raises(ModelError, match=r"model: .* cannot be loaded"):
        Ranker.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_weights_that_give_nan_are_refused_at_loading(
    checkpoint: Path, name: str, value: float
) -> None:
    rewrite(checkpoint, lambda weights: weights[name][3].fill_(value))
    with pytest.raises(ModelError, match="LlamaForCausalLM: gives NaN or infinity; its weights"):
        Ranker.from_pretrained(checkpoint)


@pytest.mark.parametrize("label_mass", [False, True])
@pytest.mark.parametrize("part", ["head", "layer"])
def test_nan_that_comes_up_later_is_an_error_and_no_score(part: str, label_mass: bool) -> None:
    from rankonce.model.loading import prepare_model
    from rankonce.ranker import RankerConfig

    network, tokenizer = build_network("llama"), build_tokenizer()
    model = prepare_model(network, tokenizer, name="llama")
    ranker = Ranker(model, config=RankerConfig(label_mass=label_mass))
    assert ranker.score(read_request(GOOD)).candidates
    with torch.no_grad():
        if part == "head":
            model.head.weight_VD[tokenizer(" Yes").input_ids] = NAN
        else:
            network.model.layers[2].mlp.down_proj.weight[0] = NAN
    with pytest.raises(NumericsError, match=r"candidates\[0\]: the model gave \[nan"):
        ranker.score(read_request(GOOD))


@pytest.mark.parametrize(
    ("option", "value"), [("device", "abacus"), ("precision", "fp7"), ("device", "cuda:99")]
)
def test_options_that_do_not_exist_are_refused_by_name(
    checkpoint: Path, option: str, value: str
) -> None:
    with pytest.raises(ModelError, match=f"^{option}: "):
        Ranker.from_pretrained(checkpoint, **{option: value})


def test_every_error_of_ours_has_one_root() -> None:
    for error in (RequestError, TaskError, LabelError, ModelError, NumericsError):
        assert issubclass(error, RankOnceError)


def test_a_copy_of_a_good_checkpoint_loads(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert Ranker.from_pretrained(tmp_path / "copy").score(read_request(GOOD)).candidates
