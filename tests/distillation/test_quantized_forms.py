"""Plain transformers reads what is written, and what a form needs is named where it is missing."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rankonce.errors import MissingDependencyError
from rankonce.evaluation.agreement import kendall_tau, log_odds
from rankonce.model import quantized
from rankonce.model.loading import load_model
from rankonce.ranker import EMBEDDED_MODEL, Ranker
from rankonce.records import read_request

LIBRARIES = {
    "fp8": "compressed_tensors",
    "cpu-int8": "compressed_tensors",
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:compressed_tensors")
@pytest.mark.parametrize("scheme", LIBRARIES)
def test_plain_transformers_gives_our_scores(written: Callable[[str], Path], scheme: str) -> None:
    if find_spec(LIBRARIES[scheme]) is None:
        pytest.skip("needs rankonce[quantize]")
    ranker = Ranker(load_model(written(scheme), device="cpu"))
    line = (EMBEDDED_MODEL / "demo.jsonl").read_text().splitlines()[0]
    tokens = ranker.prepare(read_request(json.loads(line))).rendered.tokens
    tokens = replace(tokens, segment_ids=tokens.segment_ids[::7])
    ours_CL = ranker.forward([tokens])[0].labels_CL
    network = AutoModelForCausalLM.from_pretrained(written(scheme), dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for segment in tokens.segment_ids:
            logits_V = network(torch.tensor([[*tokens.prefix_ids, *segment]])).logits[0, -1]
            rows.append([logits_V[list(forms)].logsumexp(0) for forms in tokens.label_ids])
    theirs_CL = torch.tensor(rows).float().log_softmax(dim=1)
    # They round an input where we do, but for sums that differ in the last bit.
    torch.testing.assert_close(theirs_CL, ours_CL, atol=0.05, rtol=0)
    ours_C, theirs_C = (log_odds(one_CL.double().numpy()) for one_CL in (ours_CL, theirs_CL))
    assert kendall_tau(ours_C, theirs_C) >= 0.95


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_named_where_a_checkpoint_needs_it(
    written: Callable[[str], Path], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("bitsandbytes") is None:
        pytest.skip("needs rankonce[quantize]")
    folder = written("nf4")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(MissingDependencyError, match=rf"{missing} is .*rankonce\[quantize\]"):
        load_model(folder, device="cpu")
