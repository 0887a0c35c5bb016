"""Merging, and adapters on the command line, from training to scores."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rankonce import ranker as ranker_module
from rankonce.model.loading import load_model
from rankonce.ranker import Ranker
from tests.conftest import build_network, build_request, build_tokenizer
from tests.model.test_adapters import build_adapter, build_base, differ
from tests.training.test_loop import write_examples


@pytest.fixture(autouse=True)
def _load_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # The cache of this folder's tests takes no adapters.
    monkeypatch.setattr(ranker_module, "load_model", load_model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(
        tmp_path_factory.mktemp("merge") / "base", hidden_size=64, intermediate_size=128
    )


@pytest.fixture(scope="module")
def films(base: Path) -> Path:
    return build_adapter(base, base.parent / "films", seed=1, tasks=("movie-like",))


def test_a_merged_checkpoint_scores_as_backbone_and_adapter(
    run: Callable[..., Any], base: Path, films: Path, tmp_path: Path
) -> None:
    done = run("merge", "--model", base, "--adapter", films, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.err
    assert done.err.splitlines()[-1] == f"model: {tmp_path / 'merged'}, in fp32"
    request = build_request(9)
    with_adapter = Ranker.from_pretrained(base, device="cpu", adapters={"films": films})
    merged = Ranker.from_pretrained(tmp_path / "merged", device="cpu")
    assert differ(merged.score(request), with_adapter.score(request)) <= 1e-5
    assert merged.score(request).adapter is None
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys()
    record = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert (record["run"], record["tasks"]) == ("merge", ["movie-like"])


def test_the_backbone_is_found_and_its_dtype_kept(run: Callable[..., Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_network("qwen3").to(torch.bfloat16).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    films = build_adapter(base, tmp_path / "films", seed=1)
    assert run("merge", "--adapter", films, "--out", tmp_path / "own").exit_code == 0
    wide = ("merge", "--adapter", films, "--out", tmp_path / "wide", "--dtype", "fp32")
    assert run(*wide).exit_code == 0
    own, full = (
        load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        for name in ("own", "wide")
    )
    assert (own.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    # Rounded once, after the sum.
    assert torch.equal(full.to(torch.bfloat16), own)
    assert not torch.equal(full, own.float())


def test_what_does_not_belong_together_is_refused(
    run: Callable[..., Any], base: Path, films: Path, tmp_path: Path
) -> None:
    def refuse(message: str, adapter: Path = films, model: Path = base, out: str = "out") -> None:
        done = run("merge", "--model", model, "--adapter", adapter, "--out", tmp_path / out)
        assert done.exit_code == 1
        assert message in done.err

    other = build_base(tmp_path / "other", hidden_size=64, intermediate_size=128, seed=1)
    refuse("whose weights are not those of", model=other)
    refuse("has no adapter_config.json", adapter=base)
    refuse("has no config.json", model=films)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    refuse("holds files already", out="full")
    coarse = load_model(base, device="cpu", precision="nf4")
    coarse.network.save_pretrained(tmp_path / "nf4")
    coarse.tokenizer.save_pretrained(tmp_path / "nf4")
    refuse("should be the float checkpoint", model=tmp_path / "nf4")
    assert not (tmp_path / "out").exists()


def test_qlora_from_the_command_line_to_a_merged_checkpoint(
    run: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    write_examples(tmp_path / "examples.jsonl", 12)
    done = run(
        *("finetune", "--model", base, "--data", tmp_path / "examples.jsonl"),
        *("--out", tmp_path / "run", "--epochs", "1", "--targets-per-step", "24"),
        *("--lora-rank", "4", "--lora-alpha", "4", "--lora-target", "q_proj"),
        *("--lora-dropout", "0.1", "--qlora", "--adapter-name", "films"),
    )
    assert done.exit_code == 0, done.err
    adapter = json.loads((tmp_path / "run" / "run.json").read_text())["adapter"]
    assert adapter == {
        "name": "films",
        "rank": 4,
        "alpha": 4,
        "dropout": 0.1,
        "targets": ["q_proj"],
        "quantize": "nf4",
    }
    assert run("merge", "--adapter", tmp_path / "run", "--out", tmp_path / "merged").exit_code == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (base, tmp_path / "merged")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj"}


def test_options_of_an_adapter_need_its_rank(
    run: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    write_examples(tmp_path / "examples.jsonl", 2)
    command = ("finetune", "--data", tmp_path / "examples.jsonl", "--out", tmp_path / "run")
    done = run(*command, "--model", base, "--qlora")
    assert done.exit_code == 2
    assert "--lora-rank" in done.err
    done = run(*command, "--lora-rank", "4")
    assert done.exit_code == 1
    assert "model: should be given" in done.err


def test_scores_say_which_adapter_made_them(
    run: Callable[..., Any], base: Path, films: Path, tmp_path: Path
) -> None:
    jobs = build_adapter(base, tmp_path / "jobs", seed=2)
    requests = [
        replace(build_request(3, seed=seed), adapter=name)
        for seed, name in enumerate((None, "jobs", "", "songs"))
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))
    done = run(
        *("score", path, "--model", base, "--out", tmp_path / "scores.jsonl"),
        *("--adapter", f"films={films}", "--adapter", f"jobs={jobs}"),
    )
    assert done.exit_code == 0, done.err
    results = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [result["adapter"] for result in results] == ["films", "jobs", None]
    (reject,) = (tmp_path / "scores.jsonl.rejects.jsonl").read_text().splitlines()
    assert "adapter: should be one of films, jobs, is 'songs'" in json.loads(reject)["reason"]
    done = run("score", path, "--model", base, "--adapter", "films")
    assert done.exit_code == 2
    assert "NAME=DIR" in done.err
