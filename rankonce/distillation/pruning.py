"""Structured pruning: a checkpoint becomes a smaller one that loads as any other.

Layers, MLP neurons, key/value heads with their query heads, channels of the hidden state and rows
of the vocabulary are cut, the same width in every layer. What goes is chosen by ``importance`` or,
for heads and neurons, by ``reconstruction``, which fits what stays anew; the sizes come from
``shapes``; ``slicing`` says in which sense the result is the whole model with the rest set to zero.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rankonce.distillation.importance import IMPORTANCES, Importance, measure_importance
from rankonce.distillation.reconstruction import Fit, reconstruct_network
from rankonce.distillation.shapes import (
    DecoderShape,
    ParameterAxes,
    between,
    check_shape,
    find_family,
    plan_shape,
)
from rankonce.distillation.slicing import Selection, slice_network
from rankonce.distillation.vocabulary import (
    CutVocabulary,
    cut_vocabulary,
    load_cut_tokenizer,
    renumber_config,
    write_tokenizer,
)
from rankonce.environment import describe_environment
from rankonce.errors import DataError, ModelError, TrainingError
from rankonce.model.loading import LoadedModel, load_model, use_segment_attention
from rankonce.model.work import DecoderWork, product_flop
from rankonce.prompts.labels import resolve_labels
from rankonce.prompts.tasks import Task, find_task
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import TrainingExample
from rankonce.training.checkpoint import save_model, trained_tasks
from rankonce.training.data import TokenizedExample, tokenize_examples

# Minitron finds that 512 to 1,024 sequences are enough.
CALIBRATION_ROWS = 1024
RECORD = "pruning.json"
_SIZES = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "hidden_size")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is cut, and by what measure.

    Attributes:
        keep: share of the parameters that is kept at most, the vocabulary's among them; sizes that
            are not given are chosen for it, depth never.
        num_hidden_layers, intermediate_size, num_key_value_heads, hidden_size: sizes after;
            ``None`` leaves them as they are, or to ``keep``.
        drop_unused_vocabulary: cut rows of tokens that no calibration example needs.
        importance: a name of ``IMPORTANCES``.
        reconstruct: choose heads and neurons by least squares and fit what stays anew.
        seed: of the draw of calibration examples and of random importance.
    """

    keep: float | None = None
    num_hidden_layers: int | None = None
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None
    drop_unused_vocabulary: bool = False
    importance: Literal["activation", "taylor", "random"] = "activation"
    reconstruct: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep < 1:
            raise TrainingError(f"keep: should be above 0 and below 1, is {self.keep:g}")
        for name, size in self.sizes().items():
            if size < 1:
                raise TrainingError(f"{name}: should be 1 or more, is {size}")
        if self.importance not in IMPORTANCES:
            raise TrainingError(
                f"importance: should be one of {', '.join(IMPORTANCES)}, is {self.importance!r}"
            )
        if self.seed < 0:
            raise TrainingError(f"seed: should be 0 or more, is {self.seed}")
        if self.keep is None and not self.sizes() and not self.drop_unused_vocabulary:
            raise TrainingError(
                f"keep: should be given, or one of {', '.join(_SIZES)}, drop_unused_vocabulary"
            )

    def sizes(self) -> dict[str, int]:
        """Return the sizes that are given."""
        values = {name: getattr(self, name) for name in _SIZES}
        return {name: value for name, value in values.items() if value is not None}


def prune_checkpoint(
    model: str | Path,
    out: Path,
    config: PruneConfig,
    examples: Sequence[TrainingExample],
    *,
    tasks: Sequence[Task] = (),
) -> Mapping[str, Any]:
    """Write the smaller checkpoint, with its tokenizer and the record ``pruning.json``.

    Everything is computed in FP32 and saved in the checkpoint's own dtype. Calibrations of scores
    beside the model are not taken over: they are of other weights.

    Args:
        model: folder or id of the checkpoint.
        out: a new or empty folder.
        examples: to calibrate with; importance and reconstruction use as many of them, drawn at
            random, as have ``CALIBRATION_ROWS`` candidates, the vocabulary uses all.
        tasks: beside those of the library; the vocabulary keeps their labels.

    Returns:
        The record: sizes and parameters before and after, what was kept, errors of the fits.

    Raises:
        ModelError: the architecture cannot be pruned, or sizes do not fit the checkpoint.
        TrainingError: ``out`` holds something already.
        DataError: there is no example, or one cannot be rendered.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"out: {out} holds something already; choose a new folder")
    if not examples:
        raise DataError("examples: should hold at least one to calibrate with")
    loaded = load_model(model, precision="fp32")
    network = loaded.network
    find_family(network.config)
    if getattr(network.config, "quantization_config", None) is not None:
        raise ModelError(f"model: {model} holds quantised weights; should be a float checkpoint")
    # Layers of their own, whose modules can be watched.
    loaded.acceleration.undo()
    ranker = Ranker(loaded, tasks=tasks, config=RankerConfig(calibrate=False))
    tokenized = list(tokenize_examples(examples, ranker.renderer, ranker.tasks))
    sample = _draw_rows(tokenized, seed=config.seed)
    cut = None
    if config.drop_unused_vocabulary:
        names = {example.request.task for example in examples} | {task.name for task in tasks}
        cut = _cut_vocabulary(ranker, tokenized, [find_task(n, ranker.tasks) for n in names])
    before = DecoderShape.of(network.config)
    shape = choose_shape(
        network.config, config, vocab_size=None if cut is None else len(cut.tokens)
    )
    selection, fits, smaller = _prune(network, sample, config, shape, cut)
    record = {
        "model": str(model),
        "tasks": trained_tasks(Path(model)),
        "config": asdict(config),
        "before": _describe(network, before),
        "after": _describe(smaller, shape),
        "calibration": {
            "examples": len(sample),
            "rows": sum(len(one.tokens.segment_ids) for one in sample),
            "tokens": sum(one.num_tokens for one in sample),
        },
        "kept": {
            "layers": list(selection.layers),
            "key_value_heads": [one.tolist() for one in selection.groups],
            "neurons": [one.tolist() for one in selection.neurons],
            "hidden": selection.hidden.tolist(),
            "tokens": len(selection.tokens),
        },
        "reconstruction": [
            {
                part: {"error": fit.error, "exchanges": fit.num_exchanges}
                for part, fit in zip(("attention", "mlp"), pair, strict=True)
            }
            for pair in fits
        ],
        "environment": describe_environment(),
    }
    _write(out, smaller, loaded, cut, record)
    return record


def choose_shape(
    config: Any, wanted: PruneConfig, *, vocab_size: int | None = None
) -> DecoderShape:
    """Turn what is wanted into the sizes of a model.

    Args:
        config: of the model before.
        vocab_size: after; the model's own by default.

    Raises:
        ModelError: the sizes do not fit the model.
    """
    before = DecoderShape.of(config)
    fixed = dict(wanted.sizes())
    if vocab_size is not None:
        fixed["vocab_size"] = vocab_size
    for name in _SIZES:
        most = getattr(before, name)
        if fixed.get(name, 1) > most:
            raise ModelError(f"{name}: should be from 1 to {most}, is {fixed[name]}")
    if wanted.keep is None:
        shape = replace(before, **fixed)
    else:
        total = ParameterAxes.of(config).count(before)
        shape = plan_shape(config, max_parameters=int(wanted.keep * total), fixed=fixed)
    check_shape(config, shape)
    return shape


def step_of(whole: str | Path, config: PruneConfig, *, step: int, steps: int) -> PruneConfig:
    """Find what one step of a gradual way cuts, from the model before the first step.

    Args:
        whole: checkpoint whose share ``config.keep`` is.
        step: from 1 to ``steps``.

    Raises:
        TrainingError: there is no such step, or fewer steps of different sizes.
        ModelError: the checkpoint cannot be read.
    """
    if config.keep is None:
        raise TrainingError("keep: should be given, a way in steps leads to a share")
    if not 1 <= step <= steps:
        raise TrainingError(f"step: should be from 1 to {steps}, is {step}")
    from transformers import AutoConfig

    try:
        sizes = AutoConfig.from_pretrained(whole)
    except (OSError, ValueError) as error:
        raise ModelError(f"whole: {whole} is no checkpoint: {error}") from error
    shapes = gradual_shapes(sizes, config.keep, steps, like=config)
    if len(shapes) < steps:
        raise TrainingError(
            f"steps: should be {len(shapes)} at most, so many different sizes lead to "
            f"{config.keep}, is {steps}"
        )
    return shapes[step - 1]


def gradual_shapes(
    config: Any, keep: float, steps: int, *, like: PruneConfig | None = None
) -> list[PruneConfig]:
    """Cut in steps that keep the same share each, for pruning and distilling in turns.

    The last step has the sizes of one cut to ``keep``, so that the ways there can be compared; the
    steps before lie between, each of at most ``keep ** (step / steps)`` of the parameters.

    Args:
        config: a transformers configuration of the model before the first step.
        keep: share of its parameters after the last.
        steps: 1 or more.
        like: sizes of the end that are given, and everything else of the steps. The vocabulary is
            cut in the first step if at all, and shares are counted with the whole one.

    Returns:
        A configuration of explicit sizes for each step; equal steps are left out.

    Raises:
        TrainingError: a value is out of range.
        ModelError: there is no model that small.
    """
    if steps < 1:
        raise TrainingError(f"steps: should be 1 or more, is {steps}")
    wanted = replace(like or PruneConfig(keep=keep), keep=keep)
    end = choose_shape(config, wanted)
    axes, before = ParameterAxes.of(config), DecoderShape.of(config)
    shapes = [before]
    for step in range(1, steps):
        most = int(axes.count(before) * keep ** (step / steps))
        fixed = between(config, end, step=step, steps=steps)
        shapes.append(
            plan_shape(config, max_parameters=most, fixed=fixed, least=end, most=shapes[-1])
        )
    shapes.append(end)
    found = [
        replace(wanted, keep=None, **{name: getattr(shape, name) for name in _SIZES})
        for shape in dict.fromkeys(shapes[1:])
        if shape != before
    ]
    return [
        replace(one, drop_unused_vocabulary=wanted.drop_unused_vocabulary and place == 0)
        for place, one in enumerate(found)
    ]


def _prune(
    network: Any,
    sample: Sequence[TokenizedExample],
    config: PruneConfig,
    shape: DecoderShape,
    cut: CutVocabulary | None,
) -> tuple[Selection, list[list[Fit]], Any]:
    """Choose what stays and build the smaller network.

    Returns:
        The selection in the network before, the fits of every layer where there are any, and the
        network.
    """
    before = DecoderShape.of(network.config)
    whole = Selection.everything(before)
    tokens = whole.tokens if cut is None else cut.tokens
    if replace(shape, vocab_size=before.vocab_size) == before:
        selection = replace(whole, tokens=tokens)
        return selection, [], slice_network(network, selection)
    importance = measure_importance(
        network,
        sample,
        config.importance,
        seed=config.seed,
        needs_layers=shape.num_hidden_layers < before.num_hidden_layers,
    )
    chosen = _choose(importance, shape, whole)
    if not config.reconstruct:
        selection = replace(chosen, tokens=tokens)
        return selection, [], slice_network(network, selection)
    layers = len(chosen.layers)
    # Tokens stay until the end: the examples have the old ones.
    coarse = replace(
        chosen, groups=whole.groups[:layers], neurons=whole.neurons[:layers], tokens=whole.tokens
    )
    smaller = slice_network(network, coarse)
    use_segment_attention(smaller)
    fits: list[list[Fit]] = []
    groups, neurons = reconstruct_network(
        smaller,
        sample,
        num_groups=shape.num_key_value_heads,
        num_neurons=shape.intermediate_size,
        on_layer=lambda _, found: fits.append(found),
    )
    own = Selection.everything(DecoderShape.of(smaller.config))
    smaller = slice_network(smaller, replace(own, groups=groups, neurons=neurons, tokens=tokens))
    return replace(chosen, groups=groups, neurons=neurons, tokens=tokens), fits, smaller


def _choose(importance: Importance, shape: DecoderShape, whole: Selection) -> Selection:
    layers = _largest(importance.layers, shape.num_hidden_layers).tolist()
    return replace(
        whole,
        layers=tuple(layers),
        groups=tuple(_largest(importance.groups[one], shape.num_key_value_heads) for one in layers),
        neurons=tuple(_largest(importance.neurons[one], shape.intermediate_size) for one in layers),
        hidden=_largest(importance.hidden_D, shape.hidden_size),
    )


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def _draw_rows(tokenized: Sequence[TokenizedExample], *, seed: int) -> list[TokenizedExample]:
    """Draw examples until they have ``CALIBRATION_ROWS`` candidates, in their own order."""
    drawn, rows = list[int](), 0
    for place in np.random.default_rng(seed).permutation(len(tokenized)).tolist():
        if rows >= CALIBRATION_ROWS:
            break
        drawn.append(place)
        rows += len(tokenized[place].tokens.segment_ids)
    return [tokenized[place] for place in sorted(drawn)]


def _cut_vocabulary(
    ranker: Ranker, tokenized: Sequence[TokenizedExample], tasks: Sequence[Task]
) -> CutVocabulary:
    used: set[int] = set()
    for one in tokenized:
        used.update(one.tokens.prefix_ids, *one.tokens.segment_ids, *one.tokens.label_ids)
    for task in tasks:
        used.update(*resolve_labels(task, ranker.renderer.encoder))
    cut = cut_vocabulary(ranker.model.tokenizer, used)
    num_rows = ranker.loaded.network.get_input_embeddings().weight.shape[0]
    if int(cut.tokens.max()) >= num_rows:
        raise ModelError(
            f"tokenizer: has token {int(cut.tokens.max())}, but the checkpoint has rows for "
            f"{num_rows} tokens only"
        )
    return cut


def _describe(network: Any, shape: DecoderShape) -> dict[str, Any]:
    parameters = list(network.parameters())
    weights = sum(
        layer.token_weights + layer.row_weights for layer in DecoderWork.of(network).layers
    )
    return {
        "parameters": sum(one.numel() for one in parameters),
        **shape.sizes(),
        # Of the layers' products; attention and head come on top, as prompts and labels want.
        "flop_per_token": product_flop(weights, 1),
    }


def _write(
    out: Path,
    smaller: Any,
    loaded: LoadedModel,
    cut: CutVocabulary | None,
    record: Mapping[str, Any],
) -> None:
    """Write the checkpoint aside and move it into place."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(loaded.name).dtype or torch.float32
    if cut is not None:
        renumber_config(smaller.config, cut.new_ids)
        renumber_config(smaller.generation_config, cut.new_ids)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(unfinished, smaller.to(dtype), loaded.tokenizer)
    if cut is not None:
        write_tokenizer(loaded.tokenizer, cut, unfinished)
        load_cut_tokenizer(unfinished, cut)
    (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():
        out.rmdir()
    os.replace(unfinished, out)
