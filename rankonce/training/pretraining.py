"""Pretraining on a platform's texts: the source of the stage, a run of it, and what it measured."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from rankonce.errors import DataError, TrainingError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.training.checkpoint import write_json
from rankonce.training.corpora import list_files, open_corpora
from rankonce.training.documents import Corpus, mix_corpora, tokenize_documents
from rankonce.training.loop import TrainConfig, TrainingData
from rankonce.training.model_card import write_model_card
from rankonce.training.objectives import TokenObjective
from rankonce.training.parallel import Processes
from rankonce.training.runs import run_stages
from rankonce.training.sequences import TokenSequence
from rankonce.training.stages import Stage, StageSource, Tasks, fingerprint_files

STAGE = "pretrain"
# What a tokenizer is trained on: the first texts of an epoch, up to one of these bounds.
_NUM_TOKENIZER_TEXTS = 20_000
_NUM_TOKENIZER_CHARACTERS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class PretrainingData:
    """What is read and how.

    Attributes:
        weights: times that a file or folder is read in an epoch.
        valid: files or folders of held-out texts.
        max_tokens_per_document: a longer document is cut; see ``cut_document``.
        until: Unix seconds; events and ratings at and after it are left out.
    """

    weights: Mapping[Path, float]
    valid: Sequence[Path] = ()
    max_tokens_per_document: int = 2048
    until: float | None = None


def pretrain_source(
    data: PretrainingData,
    config: TrainConfig,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> StageSource:
    """Make the source of a stage that learns the next tokens of texts.

    With ``config.max_steps`` texts are read as a stream, larger than memory if need be; with
    ``config.epochs`` the tokens of an epoch are held in memory. Texts made of rows come in another
    style in every epoch.

    Args:
        report: is told what every file was taken for.

    Raises:
        DataError: names the file and what would be right.
        TrainingError: ``max_tokens_per_document`` is below 2, or above what the model takes.
    """
    limit = data.max_tokens_per_document
    if limit < 2:
        raise TrainingError(f"max_tokens_per_document: should be 2 or more, is {limit}")
    corpora = [
        corpus
        for path, weight in data.weights.items()
        for corpus in open_corpora(path, weight=weight, until=data.until)
    ]
    valid = [corpus for path in data.valid for corpus in open_corpora(path, until=data.until)]
    for part, found in (("", corpora), ("valid: ", valid)):
        for corpus in found:
            report(f"{part}{corpus.files[0]}: {corpus.description}")
    if valid and next(mix_corpora(valid, seed=0), None) is None:
        raise DataError("valid: should hold at least one text")

    def read(corpora: Sequence[Corpus], encoder: TextEncoder, seed: int) -> Iterable[TokenSequence]:
        documents = mix_corpora(corpora, seed=seed)
        return tokenize_documents(documents, encoder, max_tokens_per_document=limit)

    def open_with(renderer: Renderer) -> TrainingData:
        if limit > renderer.max_prompt_tokens:
            raise TrainingError(
                f"max_tokens_per_document: should be up to {renderer.max_prompt_tokens}, which is "
                f"what the model takes, is {limit}"
            )
        return TrainingData(
            units=lambda epoch: read(corpora, renderer.encoder, 1000 * config.seed + epoch),
            objective=TokenObjective(),
            valid=lambda: read(valid, renderer.encoder, 0),
            is_stream=config.max_steps is not None,
        )

    def texts(_: Renderer) -> Iterable[str]:
        characters = 0
        for number, document in enumerate(mix_corpora(corpora, seed=1000 * config.seed)):
            if number == _NUM_TOKENIZER_TEXTS or characters > _NUM_TOKENIZER_CHARACTERS:
                return
            characters += len(document.text)
            yield document.text

    return StageSource(
        open=open_with,
        texts=texts,
        fingerprint={
            **fingerprint_files(list_files([*corpora, *valid])),
            "weights": [[path.name, weight] for path, weight in data.weights.items()],
            "max_tokens_per_document": limit,
            "until": data.until,
        },
    )


def pretrain(
    data: PretrainingData,
    out: Path,
    *,
    config: TrainConfig,
    size: str,
    model: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, float] | None:
    """Pretrain a model, or go on with a run, and measure it on the held-out texts.

    Returns:
        What ``describe_loss`` says, also in the stage's ``evaluation.json`` and the model card;
        ``None`` without held-out texts.

    Raises:
        RankOnceError: the data, the checkpoint or the output folder cannot be used.
    """

    def load(_: Path, config: TrainConfig, tasks: Tasks) -> StageSource:
        return pretrain_source(data, config, report=report)

    stage = Stage(name=STAGE, load=load, config=config)
    run_stages([stage], out, out, name=STAGE, size=size, seed=config.seed, model=model)
    if not data.valid:
        return None
    folder = out / "stages" / f"1-{STAGE}"
    measured = measure_texts(folder, data)
    if Processes().is_first:
        write_json(folder / "evaluation.json", {"texts": measured})
        write_model_card(out, [folder], tasks=[])
    return measured


def measure_texts(folder: Path, data: PretrainingData) -> dict[str, float]:
    """Say what a finished stage's last loss over the held-out texts amounts to."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    loss = [line["valid_loss"] for line in lines if "valid_loss" in line][-1]
    encoder = TextEncoder(AutoTokenizer.from_pretrained(folder))
    num_tokens = num_bytes = 0
    corpora = [corpus for path in data.valid for corpus in open_corpora(path, until=data.until)]
    for document in mix_corpora(corpora, seed=0):
        (ids,) = encoder.encode_documents([document.text])
        num_tokens += len(ids) - 1
        num_bytes += len(document.text.encode())
    return describe_loss(loss, num_tokens=num_tokens, num_bytes=num_bytes)


def describe_loss(loss: float, *, num_tokens: int, num_bytes: int) -> dict[str, float]:
    """Turn a mean loss per token into numbers that compare.

    Args:
        loss: nats a token, end-of-text tokens among them.
        num_bytes: of the texts in UTF-8, without anything for their ends.

    Returns:
        loss, perplexity (e to the loss), and bits_per_byte, which does not depend on the tokenizer.
    """
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * num_tokens / num_bytes / math.log(2),
    }
