"""Segment attention beside its peers, forward and backward.

Every arm is compared before it is timed, forward with the reference in fp32, backward on a GPU with
SDPA per candidate, whose mask the forward pass has shown to be right: nobody is timed on a wrong
mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from rankonce.benchmarks import peers, roofline
from rankonce.benchmarks.peers import AttentionPeer
from rankonce.benchmarks.runner import (
    Arm,
    Case,
    Difference,
    Measurement,
    UnavailableError,
    error_text,
)
from rankonce.benchmarks.timing import time_call
from rankonce.benchmarks.workloads import HeadShape, PassShape
from rankonce.layout import SegmentLayout

# Largest relative difference of one token's head, and of all gradients of an input together.
_ROW_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
OPERATION = "segment_attention"
TILES = "segment_attention tiles"
OURS, FLEX = "rankonce", "FlexAttention"


@dataclass(kw_only=True)
class AttentionInputs:
    """What the arms of a case share.

    Attributes:
        expected: what every arm should give: outputs, or gradients in a backward case.
        not_compared: why there is no ``expected``.
    """

    shape: PassShape
    layout: SegmentLayout
    q_THK: Tensor
    k_TGK: Tensor
    v_TGK: Tensor
    grad_THK: Tensor
    backward: bool
    device: str
    expected: tuple[Tensor, ...] | None = None
    not_compared: str | None = None

    @property
    def scale(self) -> float:
        """That of every peer."""
        return float(self.q_THK.shape[-1] ** -0.5)


def draw_inputs(
    shape: PassShape, heads: HeadShape, *, device: str, dtype: torch.dtype, backward: bool
) -> AttentionInputs:
    """Draw queries, keys and values."""
    torch.manual_seed(0)
    tokens = shape.num_tokens

    def draw(num_heads: int) -> Tensor:
        numbers = torch.randn(tokens, num_heads, heads.size, device=device, dtype=dtype)
        return numbers.requires_grad_(backward)

    return AttentionInputs(
        shape=shape,
        layout=shape.layout(),
        q_THK=draw(heads.queries),
        k_TGK=draw(heads.groups),
        v_TGK=draw(heads.groups),
        grad_THK=draw(heads.queries).detach(),
        backward=backward,
        device=device,
    )


def ours(inputs: AttentionInputs) -> AttentionPeer:
    """Return our kernel as the public function chooses it."""
    from rankonce.kernels.segment_attention import segment_attention
    from rankonce.model.packing import spans_of

    spans = spans_of(inputs.layout)

    def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor]:
        return (segment_attention(q_THK, k_TGK, v_TGK, spans, scale=inputs.scale),)

    return AttentionPeer(prepare=lambda *qkv: qkv, attend=attend, unpack=lambda out: out[0])


def ours_with_tile(place: int, inputs: AttentionInputs) -> AttentionPeer:
    """Return our kernel with another tile shape, by its place among the choices."""
    from rankonce.kernels.segment_attention import triton
    from rankonce.model.packing import spans_of

    spans = spans_of(inputs.layout)
    config = triton.forward_choices(inputs.q_THK.shape[-1])[place]

    def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor]:
        out_THK = triton.segment_attention_triton(
            q_THK, k_TGK, v_TGK, spans, scale=inputs.scale, config=config
        )
        return (out_THK,)

    return AttentionPeer(
        prepare=lambda *qkv: qkv, attend=attend, unpack=lambda out: out[0], note=str(config)
    )


def tile_cases(
    shapes: Sequence[PassShape], heads: Sequence[HeadShape], *, device: str, dtype: torch.dtype
) -> list[Case]:
    """List the tile shapes that are worth a try on a GPU, each an arm; the bars ignore them."""
    from rankonce.kernels.segment_attention import triton

    return [
        Case(
            suite="kernels",
            operation=TILES,
            direction="forward",
            shape=shape.name,
            subject=head.name,
            dtype=str(dtype).removeprefix("torch."),
            priority=25 + place,
            prepare=partial(draw_inputs, shape, head, device=device, dtype=dtype, backward=False),
            arms=tuple(
                Arm(
                    name=config.name,
                    measure=partial(
                        measure_peer,
                        partial(ours_with_tile, choice),
                        roofline.attention_flop(head, shape, backward=False),
                    ),
                    expected_s=4.0,
                    limit_s=40.0,
                )
                for choice, config in enumerate(triton.forward_choices(head.size))
            ),
        )
        for place, (head, shape) in enumerate(product(heads, shapes))
    ]


def reference(inputs: AttentionInputs) -> AttentionPeer:
    """Return our reference, span by span in fp32."""
    from rankonce.kernels.segment_attention.reference import segment_attention_reference
    from rankonce.model.packing import spans_of

    spans = spans_of(inputs.layout)

    def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor]:
        return (segment_attention_reference(q_THK, k_TGK, v_TGK, spans, scale=inputs.scale),)

    return AttentionPeer(prepare=lambda *qkv: qkv, attend=attend, unpack=lambda out: out[0])


def _dense(backend: SDPBackend | None, inputs: AttentionInputs) -> AttentionPeer:
    return peers.sdpa_dense(inputs.layout, backend, device=inputs.device, dtype=inputs.q_THK.dtype)


def _flex(inputs: AttentionInputs) -> AttentionPeer:
    on_gpu = inputs.device.startswith("cuda")
    if inputs.backward and not on_gpu:
        raise UnavailableError("has no backward pass on a CPU")
    return peers.flex(inputs.layout, device=inputs.device, compiled=on_gpu)


def _per_candidate(inputs: AttentionInputs) -> AttentionPeer:
    return peers.sdpa_per_candidate(inputs.shape)


def _merged_halves(inputs: AttentionInputs) -> AttentionPeer:
    return peers.sdpa_merged_halves(inputs.shape, on_gpu=inputs.device.startswith("cuda"))


def values_of(peer: AttentionPeer, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    """Compute an arm's output, or its gradients in a backward case."""
    leaves = (inputs.q_THK, inputs.k_TGK, inputs.v_TGK)
    out_THK = peer.unpack(peer.attend(*peer.prepare(*leaves)))
    if not inputs.backward:
        return (out_THK,)
    return torch.autograd.grad(out_THK, leaves, inputs.grad_THK)


def row_difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Compare outputs head by head of every token: one wrong row is enough."""
    (out,), (right,) = values, expected
    delta, right = out.float() - right.float(), right.float()
    error = (delta.norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-12)).max()
    return Difference(
        max_abs=float(delta.abs().max()), error=float(error), tolerance=_ROW_TOLERANCE[out.dtype]
    )


def tensor_difference(
    values: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> Difference:
    """Compare each tensor as a whole and return the worst."""
    pairs = [(a.float(), b.float()) for a, b in zip(values, expected, strict=True)]
    largest = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    errors = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs])
    return Difference(max_abs=float(largest), error=float(errors.max()), tolerance=tolerance)


def _compare(values: Sequence[Tensor], expected: Sequence[Tensor], backward: bool) -> Difference:
    if backward:
        return tensor_difference(values, expected, _GRADIENT_TOLERANCE[values[0].dtype])
    return row_difference(values, expected)


def _expect(inputs: AttentionInputs) -> str | None:
    """Compute what every arm is compared with, once; why there is nothing, if there is nothing."""
    # The reference keeps gradients of every span: too much for a large pass.
    peer = _per_candidate if inputs.backward and inputs.device.startswith("cuda") else reference
    if inputs.expected is None and inputs.not_compared is None:
        try:
            inputs.expected = tuple(v.detach() for v in values_of(peer(inputs), inputs))
        except RuntimeError as error:  # too large for the memory, or no kernel for it
            inputs.not_compared = f"compared with nothing: {error_text(error)}"
    return inputs.not_compared


def measure_peer(
    build: Callable[[AttentionInputs], AttentionPeer], flop: float, inputs: AttentionInputs
) -> Measurement:
    """Compare an arm's values with what is expected and time it if they are right."""
    with torch.set_grad_enabled(inputs.backward):
        note = _expect(inputs)
        peer = build(inputs)
        values = tuple(value.detach() for value in values_of(peer, inputs))
        difference = None
        if inputs.expected is not None:
            difference = _compare(values, inputs.expected, inputs.backward)
        del values
        note = "; ".join(text for text in (peer.note, note) if text) or None
        if difference is not None and difference.is_wrong:
            return Measurement(timing=None, difference=difference, note=note)
        with torch.no_grad():
            native = peer.prepare(inputs.q_THK, inputs.k_TGK, inputs.v_TGK)
        call = _timed_call(peer, native, backward=inputs.backward)
        call()
        timing = time_call(call, inputs.device, queued=True)
    return Measurement(
        timing=timing, difference=difference, flop=flop, ceiling="matmul_tflops", note=note
    )


def _timed_call(
    peer: AttentionPeer, native: tuple[Tensor, ...], *, backward: bool
) -> Callable[[], Any]:
    if not backward:
        return lambda: peer.attend(*native)
    native = tuple(tensor.detach().requires_grad_() for tensor in native)
    outputs = peer.attend(*native)
    gradients = tuple(torch.randn_like(out) for out in outputs)
    return lambda: torch.autograd.grad(outputs, native, gradients, retain_graph=True)


def attention_cases(
    shapes: Sequence[PassShape],
    heads: Sequence[HeadShape],
    *,
    device: str,
    dtype: torch.dtype,
) -> list[Case]:
    """List the cases; the first shape and heads come first."""
    dense: list[tuple[str, SDPBackend | None]] = [("SDPA, dense mask", None)]
    if device.startswith("cuda"):
        dense = [
            ("SDPA, dense mask (cuDNN)", SDPBackend.CUDNN_ATTENTION),
            ("SDPA, dense mask (efficient)", SDPBackend.EFFICIENT_ATTENTION),
        ]
    builders: dict[str, tuple[Callable[[AttentionInputs], AttentionPeer], float]] = {
        OURS: (ours, 15.0),
        FLEX: (_flex, 12.0),
        **{name: (partial(_dense, backend), 6.0) for name, backend in dense},
        "SDPA per candidate": (_per_candidate, 4.0),
        "SDPA, halves merged": (_merged_halves, 4.0),
        "reference": (reference, 6.0),
    }
    forward_only = ("SDPA, halves merged", "reference")
    cases = []
    for backward in (False, True):
        for head, shape in product(heads, shapes):
            flop = roofline.attention_flop(head, shape, backward=backward)
            arms = tuple(
                Arm(
                    name=name,
                    measure=partial(measure_peer, build, flop),
                    expected_s=seconds,
                    limit_s=90.0,
                )
                for name, (build, seconds) in builders.items()
                if not (backward and name in forward_only)
            )
            prepare = partial(
                draw_inputs, shape, head, device=device, dtype=dtype, backward=backward
            )
            cases.append(
                Case(
                    suite="kernels",
                    operation=OPERATION,
                    direction="backward" if backward else "forward",
                    shape=shape.name,
                    subject=head.name,
                    dtype=str(dtype).removeprefix("torch."),
                    priority=_priority(head, shape, heads, shapes, backward=backward),
                    prepare=prepare,
                    arms=arms,
                )
            )
    return cases


def _priority(
    head: HeadShape,
    shape: PassShape,
    heads: Sequence[HeadShape],
    shapes: Sequence[PassShape],
    *,
    backward: bool,
) -> int:
    """What the bars ask about first; then other heads, other shapes, the backward pass."""
    first_head, place = head == heads[0], shapes.index(shape)
    if backward:
        return 50 + place if first_head else 65 if place == 0 else 80
    if first_head:
        return place
    return 20 if place == 0 else 30
