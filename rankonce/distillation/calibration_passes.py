"""Calibration examples through the packed pass of a plain network, with what its layers see.

The network runs its own layers, with segment attention and without the fused ones, so that every
module is called and can be watched. Of the last layer's attention output, MLP and norms behind it
only score rows count: nothing else of them reaches the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from rankonce.training.data import TokenizedExample, TrainingBatch, pack_examples
from rankonce.training.steps import split_by_tokens

MAX_TOKENS_PER_PASS = 8192


@dataclass(frozen=True, kw_only=True)
class CalibrationPass:
    """One pass.

    Attributes:
        examples_T: for every token its example's place in the pass, from 0.
        score_rows_C: the last token of every candidate.
    """

    batch: TrainingBatch
    examples_T: Tensor
    score_rows_C: Tensor
    num_examples: int

    def counted(self, x_TN: Tensor, *, score_rows: bool) -> tuple[Tensor, Tensor]:
        """Take the rows that count, and their examples."""
        if not score_rows:
            return x_TN, self.examples_T
        rows = self.score_rows_C.long()
        return x_TN[rows], self.examples_T[rows]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in the network that is watched.

    Attributes:
        module: whose input is watched, or its output if ``is_output``.
        score_rows: only these rows count.
    """

    module: nn.Module
    is_output: bool = False
    score_rows: bool = False


def mlp_sites(network: Any) -> list[Site]:
    """Give the place of every layer's neurons: what its down projection takes."""
    layers = network.base_model.layers
    return [Site(module=layer.mlp.down_proj, score_rows=layer is layers[-1]) for layer in layers]


def attention_sites(network: Any) -> list[Site]:
    """Give the place of every layer's heads: what its output projection takes."""
    layers = network.base_model.layers
    return [Site(module=layer.self_attn.o_proj, score_rows=layer is layers[-1]) for layer in layers]


def hidden_sites(network: Any) -> list[Site]:
    """Give the places that read the hidden state: the norms in front of what layers compute."""
    layers = network.base_model.layers
    sites = []
    for layer in layers:
        before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        sites.append(Site(module=layer.input_layernorm, is_output=True))
        sites.append(Site(module=before_mlp, is_output=True, score_rows=layer is layers[-1]))
    return [*sites, Site(module=network.base_model.norm, is_output=True, score_rows=True)]


@contextmanager
def watch(sites: Sequence[Site], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand what passes each site, T x N, to a function with the site's number."""
    handles = []
    for number, site in enumerate(sites):
        if site.is_output:

            def see_output(_: Any, __: Any, out: Tensor, number: int = number) -> None:
                see(number, out)

            handles.append(site.module.register_forward_hook(see_output))
        else:

            def see_input(_: Any, args: tuple[Tensor, ...], number: int = number) -> None:
                see(number, args[0])

            handles.append(site.module.register_forward_pre_hook(see_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibration_passes(
    examples: Sequence[TokenizedExample], device: torch.device, *, description: str
) -> Iterator[CalibrationPass]:
    """Pack examples into passes, with a progress bar on stderr."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(description, total=len(examples))
        for part in split_by_tokens(examples, max_tokens_per_pass=MAX_TOKENS_PER_PASS):
            batch = pack_examples(part, device)
            lengths = torch.tensor([example.num_tokens for example in part])
            yield CalibrationPass(
                batch=batch,
                examples_T=torch.repeat_interleave(torch.arange(len(part)), lengths).to(device),
                score_rows_C=batch.batch.segment_pass.score_rows_C,
                num_examples=len(part),
            )
            progress.advance(bar, len(part))
