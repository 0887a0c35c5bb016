"""Load a checkpoint and make sure that it can run packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rankonce.errors import ModelError, ShapeError
from rankonce.kernels.segment_attention.tiles import TileKey
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model.acceleration import Acceleration, accelerate_model
from rankonce.model.adapters import (
    Adapters,
    add_adapters,
    check_base,
    fingerprint_base,
    read_adapter,
)
from rankonce.model.attention import ATTENTION_NAME, SegmentPass, register_segment_attention
from rankonce.model.head import Head, head_of
from rankonce.model.known import (
    UNUSABLE_FILES,
    KnownModel,
    check_decoder_only,
    check_source,
    first_line,
    load_tokenizer,
)
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.precision import find_precision, loading_options, settle_4bit_layers
from rankonce.model.quantized import (
    ROW_SCHEMES,
    check_stored,
    find_scheme,
    row_layers,
    settle_dtype,
    settle_layers,
    stored_options,
    warn_refused,
)

# Largest difference of logits between packed and separate, as a part of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same for 8-bit products: a difference in the last bit moves inputs by a whole step.
_QUANTIZED_TOLERANCE = 1e-1
_FP8_TAKES_NONE = (
    "precision: fp8 and cpu-int8 take no adapters, whose inputs would be quantised; merge one "
    "into a checkpoint (rankonce merge), or choose another precision"
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel(KnownModel):
    """A model that has been seen to run packed.

    Attributes:
        network: the transformers model, its attention replaced.
        head: the FP32 head.
        acceleration: what runs on our kernels, and the way back.
        table_keys: the attention tables that its layers ask for on its device.

    The longest prompt is the context, or a window that the model applies by its mask alone or the
    reach of its short rotary factors if that is shorter.
    """

    network: Any
    head: Head
    acceleration: Acceleration
    table_keys: tuple[TileKey, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight_VD.device

    @property
    def is_capturable(self) -> bool:
        """Whether its passes can be recorded as CUDA graphs: every step runs on our kernels."""
        return self.device.type == "cuda" and self.acceleration.is_complete


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    precision: str | None = None,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
) -> LoadedModel:
    """Load a decoder-only checkpoint from a folder or a hub.

    Args:
        name: folder in Hugging Face form, or the id of a repository on the hub.
        device: ``cpu``, ``cuda``, ...; the GPU where there is one.
        precision: a name of ``PRECISIONS``; by default bf16 on a GPU, fp32 on a CPU.
        keep: names or patterns of linear layers that FP8 leaves as they are.
        trust_remote_code: run model code that comes with the checkpoint.
        adapters: folders of adapters over the checkpoint, by the names that requests give them.

    Raises:
        ModelError: says what is wrong with the checkpoint or an adapter.
    """
    source = str(name)
    check_source(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = find_precision(precision, device)
    if adapters and chosen.fp8:
        raise ModelError(_FP8_TAKES_NONE)
    _check_device(device)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_decoder_only(source, config, trust_remote_code)
        scheme = find_scheme(config)
        kept_config = getattr(config, "quantization_config", None)
        if scheme is None or scheme == "other":
            options = loading_options(chosen, device)
        else:
            check_stored(scheme, precision, chosen, source)
            if adapters and scheme in ROW_SCHEMES:
                raise ModelError(_FP8_TAKES_NONE)
            options = stored_options(config, scheme, chosen, device)
        tokenizer = load_tokenizer(source, trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            config=config,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager",
            **options,
        )
    except SafetensorError as error:
        raise ModelError(f"model: {source}: a safetensors file is broken: {error}") from error
    except UNUSABLE_FILES as error:
        raise ModelError(f"model: {source} cannot be loaded: {first_line(error)}") from error
    network, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        raise ModelError(
            f"model: {source} lacks {len(missing)} weights of its architecture: "
            f"{', '.join(missing[:3])}"
        )
    if scheme in ROW_SCHEMES:
        scales = [key for key in report["unexpected_keys"] if key.endswith("weight_scale")]
        if scales:
            raise ModelError(
                f"model: {source} quantises layers that it cannot be read with: {scales[0]}"
            )
        settle_layers(network, chosen.dtype_on(device))
        network.config.quantization_config = kept_config
    elif scheme in ("int8", "nf4"):
        settle_dtype(network, chosen.dtype_on(device))
    if scheme is not None:
        warn_refused(source)
    if "device_map" not in options:
        network = network.to(device)
    if getattr(network, "is_loaded_in_4bit", False):
        settle_4bit_layers(network)
    # Before acceleration, which takes the linear layers as it finds them.
    added = add_adapters(network, adapters or {}, base=source)
    return prepare_model(
        network.eval(),
        tokenizer,
        name=source,
        fp8=chosen.fp8 and scheme is None,
        keep=keep,
        adapters=added,
    )


def add_adapter(model: LoadedModel, folder: str | Path, *, name: str) -> None:
    """Put one more adapter over a model that is in use; no pass may run meanwhile.

    Its layers go on our kernels anew, so that recorded passes hold what is no longer there.

    Raises:
        ModelError: the adapter does not fit or the model takes none; it is as before.
    """
    if model.acceleration.is_fp8 or any(row_layers(model.network)):
        raise ModelError(_FP8_TAKES_NONE)
    files = read_adapter(folder, name=name)
    check_base(files, model.name, fingerprint_base(model.name))
    model.acceleration.undo()
    try:
        model.adapters.add(model.network, files)
    finally:
        model.acceleration.become(accelerate_model(model.network))


def prepare_model(
    network: Any,
    tokenizer: Any,
    *,
    name: str,
    fp8: bool = False,
    keep: Sequence[str] = (),
    adapters: Adapters | None = None,
) -> LoadedModel:
    """Put a transformers model on our kernels and check that packed equals separate.

    Args:
        fp8: quantise the linear layers but those that ``keep`` names.
        adapters: what ``add_adapters`` put into the network.

    Raises:
        ModelError: the architecture cannot run packed, or not in FP8.
    """
    head = head_of(network)
    acceleration, probe = check_packable(network, head)
    windows = probe.sliding_windows
    if fp8:
        acceleration.undo()
        acceleration = accelerate_model(network, "fp8", keep=keep)
    elif keep:
        raise ModelError("keep: names layers that FP8 leaves as they are; precision should be fp8")
    config = network.config.get_text_config()
    limits = [*_mask_windows(config, windows), *_rope_limits(config)]
    context = getattr(config, "max_position_embeddings", None) or 2**31
    num_embeddings = network.get_input_embeddings().weight.shape[0]
    return LoadedModel(
        network=network,
        tokenizer=tokenizer,
        head=head,
        max_prompt_tokens=min([*limits, context]),
        name=name,
        num_vocabulary=min(num_embeddings, head.weight_VD.shape[0]),
        acceleration=acceleration,
        adapters=adapters or Adapters(),
        table_keys=tuple(
            replace(key, window=window)
            for key in dict.fromkeys((*probe.spans.tables, *probe.score_spans.tables))
            if isinstance(key, TileKey)
            for window in (None, *sorted(windows))
        ),
    )


def _mask_windows(config: Any, reported: set[int]) -> list[int]:
    """Find the windows that a model applies by its mask alone.

    Packed passes have no mask of transformers, so a window that the layers do not hand to their
    attention is only seen in the configuration.

    Args:
        reported: windows that the layers handed over.
    """
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    slides = window not in reported and (
        layer_types is None or any("sliding" in layer_type for layer_type in layer_types)
    )
    chunk = getattr(config, "attention_chunk_size", None)
    chunks = layer_types is None or "chunked_attention" in layer_types
    return [int(size) for size, used in ((window, slides), (chunk, chunks)) if size and used]


def _rope_limits(config: Any) -> list[int]:
    """Find the positions up to which rotary factors are those of a short prompt.

    ``longrope`` chooses its factors by the longest position of a pass, so that a long prompt would
    change the scores of the short ones beside it.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have one entry for each type of layer.
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    limits = []
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) in ("longrope", "su") or "long_factor" in kind:
            limits += [
                kind.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
            ]
    return [int(limit) for limit in limits if limit]


@torch.no_grad()
def check_packable(network: Any, head: Head) -> tuple[Acceleration, SegmentPass]:
    """Run two short candidates separately and packed and compare the logits.

    This is what refuses layers that carry state from token to token, attention that is not ours to
    replace, and heads that do more than a product.

    Returns:
        What runs on our kernels, and the packed pass, which knows the layers' windows and tables.

    Raises:
        ModelError: names the architecture and what does not fit.
    """
    name = type(network).__name__
    if not getattr(network, "_supports_attention_backend", False):
        raise ModelError(f"{name}: does not take transformers' attention interface")
    device = head.weight_VD.device
    ids = [1 + i * 7 % (head.weight_VD.shape[0] - 1) for i in range(9)]
    probe = TokenizedRequest(
        prefix_ids=tuple(ids[:4]), segment_ids=(tuple(ids[4:7]), tuple(ids[7:9])), label_ids=((0,),)
    )
    was_training = network.training
    network.eval()
    part = PassPart(request=0, first=0, last=2, cached=False)
    batch = pack_pass([part], [probe], {}, keep_prefixes=False, device=device)
    try:
        separate = [
            network(torch.tensor([[*probe.prefix_ids, *segment]], device=device)).logits[0, -1]
            for segment in probe.segment_ids
        ]
        use_segment_attention(network)
        forward_pass(network, batch)
        plain_windows = batch.segment_pass.sliding_windows
        batch = pack_pass([part], [probe], {}, keep_prefixes=False, device=device)
        acceleration = accelerate_model(network)
        hidden_CD = forward_pass(network, batch)
    except (TypeError, AttributeError, ValueError, RuntimeError, ShapeError) as error:
        raise ModelError(f"{name}: cannot take a packed pass: {first_line(error)}") from error
    finally:
        network.train(was_training)
    layers = network.config.get_text_config().num_hidden_layers
    if batch.segment_pass.num_layers != layers:
        raise ModelError(
            f"{name}: {batch.segment_pass.num_layers} of {layers} layers are attention; the others "
            "would carry one candidate into the next"
        )
    if batch.segment_pass.sliding_windows != plain_windows:
        raise ModelError(
            f"{name}: its layers have windows of {sorted(plain_windows)} tokens, accelerated ones "
            f"of {sorted(batch.segment_pass.sliding_windows)}"
        )
    packed = _logits(head, hidden_CD)
    expected = torch.stack(separate).float()
    if not expected.isfinite().all():
        raise ModelError(
            f"{name}: gives NaN or infinity; its weights or its precision are at fault"
        )
    worst = float((packed - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    tolerance = _TOLERANCE.get(head.weight_VD.dtype, 1e-4)
    if getattr(network, "is_loaded_in_8bit", False) or any(row_layers(network)):
        tolerance = max(tolerance, _QUANTIZED_TOLERANCE)
    if not worst <= tolerance:
        raise ModelError(
            f"{name}: packed and separate logits differ by {worst:.2g} of the largest logit; its "
            "layers or its head do more than RankOnce knows of"
        )
    return acceleration, batch.segment_pass


def use_segment_attention(network: nn.Module) -> None:
    """Make the model's attention layers run segment attention."""
    register_segment_attention()
    network.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]


def _logits(head: Head, hidden_CD: Tensor) -> Tensor:
    logits = hidden_CD.float() @ head.weight_VD.float().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ModelError(f"device: {device!r} cannot be used: {first_line(error)}") from error
