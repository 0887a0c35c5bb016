"""A whole pass on one model: packing, decoder, and the log-probabilities of the labels."""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankonce.benchmarks.attention import OURS
from rankonce.benchmarks.roofline import Ceilings, limits_ms, work_of
from rankonce.benchmarks.runner import Difference, Measurement, UnavailableError
from rankonce.benchmarks.timing import Timing, time_call
from rankonce.benchmarks.workloads import (
    ModelShape,
    PassShape,
    build_network,
)
from rankonce.kernels.segment_attention.tiles import TileKey
from rankonce.layout import PassPart, TokenizedRequest

# Of the relative difference of log-probabilities around their mean; unrelated ones give 1.4.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "fp8": 0.5}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "fp8": "fp8"}
PLAIN, BF16, FP8 = f"{OURS}, plain modules", f"{OURS}, accelerated", f"{OURS}, accelerated FP8"
BF16_GRAPH, FP8_GRAPH = f"{BF16}, CUDA graph", f"{FP8}, CUDA graph"


@dataclass(kw_only=True)
class PassInputs:
    """What the arms of a case share.

    Attributes:
        expected_CL: log-probabilities of the first candidates, of one prompt each; of all of them
            once an arm has agreed.
        table_keys: the attention tables that the network asked for.
    """

    model: ModelShape
    shape: PassShape
    network: Any
    request: TokenizedRequest
    device: str
    dtype: str
    ceilings: Callable[[], Ceilings]
    expected_CL: Tensor = field(default_factory=lambda: torch.empty(0))
    table_keys: tuple[TileKey, ...] = ()

    @property
    def part(self) -> PassPart:
        """The one part of the pass."""
        return PassPart(request=0, first=0, last=self.shape.num_candidates, cached=False)

    def pack(self) -> Any:
        """Pack the pass."""
        from rankonce.model.packing import pack_pass

        return pack_pass(
            [self.part],
            [self.request],
            {},
            keep_prefixes=False,
            device=self.device,
            table_keys=self.table_keys,
        )

    def prompts(self, first: int, last: int) -> Tensor:
        """Return whole prompts of some candidates."""
        prefix = self.request.prefix_ids
        rows = [(*prefix, *self.request.segment_ids[i]) for i in range(first, last)]
        return torch.tensor(rows, device=self.device)

    @property
    def num_prompts(self) -> int:
        """Whole prompts that hold about as many tokens as the pass."""
        fitting = self.shape.num_tokens // self.shape.prompt_tokens
        return min(self.shape.num_candidates, max(2, fitting))

    def run_prompts(self, prompts: Tensor, **options: Any) -> Tensor:
        """Run transformers over prompts, or their ends behind a cache; the labels' log-probs."""
        self.network.set_attn_implementation("sdpa")
        output = self.network(prompts, logits_to_keep=1, **{"use_cache": False, **options})
        ids = [forms[0] for forms in self.request.label_ids]
        logits_CL: Tensor = output.logits[:, -1, ids]
        return logits_CL.float().log_softmax(dim=-1)


def draw_inputs(
    model: ModelShape,
    shape: PassShape,
    ceilings: Callable[[], Ceilings],
    *,
    device: str,
    dtype: torch.dtype,
) -> PassInputs:
    """Build the network, draw the tokens, and score some candidates with a prompt each."""
    inputs = PassInputs(
        model=model,
        shape=shape,
        network=build_network(model, device=device, dtype=dtype),
        request=shape.request(model.vocab_size),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        ceilings=ceilings,
    )
    with torch.no_grad():
        prompts = inputs.prompts(0, inputs.num_prompts)
        inputs.expected_CL = inputs.run_prompts(prompts)
    return inputs


def measure(
    inputs: PassInputs,
    score: Callable[[], Tensor],
    *,
    precision: str,
    details: dict[str, float] | None = None,
    note: str | None = None,
) -> Measurement:
    """Compare the log-probabilities with those expected and time the trip."""
    with torch.no_grad():
        difference = difference_of(inputs, score(), precision)
        timing = None if difference.is_wrong else time_call(score, inputs.device)
    return measurement(inputs, timing, difference, details or {}, note)


def measurement(
    inputs: PassInputs,
    timing: Timing | None,
    difference: Difference,
    details: dict[str, float],
    note: str | None,
) -> Measurement:
    """Put limits and work of the shape beside a time."""
    limits = limits_ms(inputs.model, inputs.shape, inputs.ceilings())
    if timing is not None:
        candidates = inputs.shape.num_candidates / timing.median_ms * 1e3
        details = {**details, "candidates_per_s": candidates}
    work = work_of(inputs.model, inputs.shape)
    amounts = {
        "gemm_tflop": work.gemm_flop / 1e12,
        "attention_tflop": work.attention_flop / 1e12,
        "head_tflop": work.head_flop / 1e12,
    }
    return Measurement(
        timing=timing,
        difference=difference,
        flop=work.flop,
        ceiling="matmul_tflops",
        details={**amounts, **limits, **details},
        note=note,
    )


def difference_of(inputs: PassInputs, found_CL: Tensor, precision: str) -> Difference:
    """Compare log-probabilities of as many candidates as are known."""
    known = min(len(found_CL), len(inputs.expected_CL))
    expected_CL = inputs.expected_CL[:known]
    delta_CL = found_CL[:known].float() - expected_CL
    spread_CL = expected_CL - expected_CL.mean(dim=0)
    difference = Difference(
        max_abs=float(delta_CL.abs().max()),
        error=float(delta_CL.norm() / spread_CL.norm().clamp(min=1e-12)),
        tolerance=_TOLERANCE[precision],
    )
    if len(found_CL) > known and precision == inputs.dtype and not difference.is_wrong:
        inputs.expected_CL = found_CL.float()
    return difference


def packed_call(inputs: PassInputs) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """Return the trip through packing, decoder and head, and what packing alone takes."""
    from rankonce.model.head import head_of
    from rankonce.model.packing import forward_pass

    learn_tables(inputs)

    def score() -> Tensor:
        hidden_CD = forward_pass(inputs.network, inputs.pack())
        head = head_of(inputs.network)
        return head.label_logprobs(hidden_CD, inputs.request.label_ids)

    def pack() -> None:
        inputs.pack()
        if inputs.device.startswith("cuda"):
            torch.cuda.synchronize()

    pack()
    return score, {"packing_ms": time_call(pack, "cpu").median_ms}


@torch.no_grad()
def learn_tables(inputs: PassInputs) -> None:
    """Run a pass to see which tables it asks for, so that later ones move them along."""
    from rankonce.model.packing import forward_pass

    batch = inputs.pack()
    forward_pass(inputs.network, batch)
    tables = batch.segment_pass.spans.tables
    inputs.table_keys = tuple(key for key in tables if isinstance(key, TileKey))


def use_ours(inputs: PassInputs) -> None:
    """Make the network run segment attention."""
    from rankonce.model.loading import use_segment_attention

    use_segment_attention(inputs.network)


def measure_plain(inputs: PassInputs) -> Measurement:
    """Our attention, the modules of transformers for everything else."""
    use_ours(inputs)
    score, details = packed_call(inputs)
    return measure(inputs, score, precision=inputs.dtype, details=details)


@contextmanager
def accelerated(inputs: PassInputs, precision: str) -> Any:
    """Run with the network accelerated."""
    try:
        module = importlib.import_module("rankonce.model.acceleration")
    except ModuleNotFoundError as error:
        raise UnavailableError("rankonce.model.acceleration does not exist") from error
    use_ours(inputs)
    handle = module.accelerate_model(inputs.network, precision=precision)
    try:
        yield handle
    finally:
        handle.undo()


def measure_accelerated(kind: str | None, inputs: PassInputs) -> Measurement:
    """Our kernels for norms, activations and, in FP8, linear layers.

    Args:
        kind: ``fp8``; the dtype of the run if ``None``.
    """
    kind = kind or inputs.dtype
    with accelerated(inputs, _PRECISIONS[kind]) as handle:
        score, details = packed_call(inputs)
        return measure(
            inputs, score, precision=kind, details=details, note=str(handle.report)[:300]
        )


def measure_graph(kind: str | None, inputs: PassInputs) -> Measurement:
    """The accelerated pass as a recorded graph."""
    from rankonce.model.execution import PassRunner
    from rankonce.model.head import head_of

    if not inputs.device.startswith("cuda"):
        raise UnavailableError("recorded on a GPU only")
    kind = kind or inputs.dtype
    with accelerated(inputs, _PRECISIONS[kind]):
        learn_tables(inputs)
        tokens = inputs.shape.num_tokens
        runner = PassRunner(inputs.network, inputs.table_keys, max_graph_tokens=tokens)

        def score() -> Tensor:
            hidden_CD, _ = runner.run([inputs.part], [inputs.request], {}, keep_prefixes=False)
            head = head_of(inputs.network)
            return head.label_logprobs(hidden_CD, inputs.request.label_ids)

        return measure(inputs, score, precision=kind)


def measure_compiled(inputs: PassInputs) -> Measurement:
    """The plain pass through torch.compile."""
    if not inputs.device.startswith("cuda"):
        raise UnavailableError("compiled on a GPU only")
    use_ours(inputs)
    score, details = packed_call(inputs)
    decoder = inputs.network.base_model
    eager_forward = decoder.forward
    torch._dynamo.reset()
    decoder.forward = torch.compile(eager_forward, dynamic=False)
    try:
        return measure(inputs, score, precision=inputs.dtype, details=details)
    finally:
        decoder.forward = eager_forward
