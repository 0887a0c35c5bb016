"""A ranker for search from nothing but the collection and a few judged queries.

Two stages, both on the prompts of the task ``search-relevance``:

pretrain   no query and no judgement: titles and sentences play queries, and a result's grade is how
           much it is like the document that they were taken from. Nothing of that document but
           these few words is in the prompt, so that the model learns which evidence tells of a
           likeness it cannot see.
finetune   the judged queries of one fold, graded as people graded them.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from rankonce.datasets.candidate_lists import CandidateList
from rankonce.datasets.search_evidence import EvidenceWriter, View, view_request
from rankonce.datasets.search_index import Floats, Ints, SearchIndex
from rankonce.datasets.search_sets import SearchFold
from rankonce.errors import DataError
from rankonce.ranker import Ranker
from rankonce.records import ScoreRequest, TrainingExample
from rankonce.training.checkpoint import is_finished
from rankonce.training.loop import TrainConfig
from rankonce.training.runs import run_stages
from rankonce.training.stages import Stage, StageSource, Tasks, label_source

# Quantiles of likeness over all results at which the grade passes 0, 1, 2, 3 and 4: about as rare
# as people's grades are.
_GRADE_QUANTILES = (0.6, 0.94, 0.97, 0.99, 0.998)
_SENTENCE_WORDS = (8, 30)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a search ranker is trained.

    Attributes:
        size: of the model.
        view: what a candidate says of itself.
        alike_per_list, drawn_per_list: candidates of a list in ``pretrain``: those most like the
            source, and a draw from the others.
        unjudged_per_list: candidates of grade 0 in ``finetune``, drawn anew every epoch, beside
            all of higher grades.
        pretraining, finetuning: of the two stages.
    """

    size: str = "1m"
    view: View = View.EVIDENCE
    alike_per_list: int = 6
    drawn_per_list: int = 10
    unjudged_per_list: int = 12
    pretraining: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=1, targets_per_step=192, learning_rate=2e-3, averaging=0.98, seed=1
        )
    )
    finetuning: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=2,
            targets_per_step=96,
            learning_rate=5e-4,
            dropout=0.1,
            averaging=0.95,
            seed=1,
        )
    )


def pretrain(index: SearchIndex, out: Path, config: SearchConfig) -> Path:
    """Train from random weights on a collection alone; a run found in ``out`` goes on.

    Returns:
        The folder of the model.
    """

    @cache
    def epoch(number: int) -> list[TrainingExample]:
        return collection_examples(index, config, seed=1000 * config.pretraining.seed + number)

    fingerprint = {"documents": _digest(index.documents.items())}
    _run("pretrain", epoch, fingerprint, out, config.pretraining, size=config.size)
    return out


def finetune(
    lists: Sequence[CandidateList], out: Path, config: SearchConfig, *, start: Path | None
) -> Path:
    """Train on judged lists, from a pretrained model or from random weights.

    Returns:
        The folder of the model.
    """

    @cache
    def epoch(number: int) -> list[TrainingExample]:
        return judged_examples(lists, config, seed=1000 * config.finetuning.seed + number)

    requests = [(one.request.id, one.grades, asdict(one.request)) for one in lists]
    _run(
        "finetune",
        epoch,
        {"lists": _digest(requests)},
        out,
        config.finetuning,
        size=config.size,
        model=None if start is None else str(start),
    )
    return out


def _run(
    name: str,
    epoch: Callable[[int], Iterable[TrainingExample]],
    fingerprint: dict[str, str],
    out: Path,
    config: TrainConfig,
    *,
    size: str,
    model: str | None = None,
) -> None:
    """Run one stage on examples at hand; a finished one is not run again."""

    def load(_: Path, __: TrainConfig, tasks: Tasks) -> StageSource:
        return label_source(epoch, tasks=tasks, fingerprint=fingerprint)

    if not is_finished(out):
        run_stages(
            [Stage(name=name, load=load, config=config)],
            out,
            out,
            name=f"search-{name}",
            size=size,
            seed=config.seed,
            model=model,
        )


def score_requests(folder: Path, requests: Iterable[ScoreRequest], *, view: View) -> list[Floats]:
    """Score requests with a trained model: the expected grade of every candidate."""
    ranker = Ranker.from_pretrained(folder, device="cpu", precision="fp32")
    shown = [view_request(request, view) for request in requests]
    return [
        np.array([candidate.value for candidate in result.candidates])
        for result in ranker.score_many(shown, progress=False)
    ]


def score_fold(
    fold: SearchFold, out: Path, config: SearchConfig, *, pretrained: Path | None
) -> list[Floats]:
    """Fine-tune on a fold's train lists and score its test lists."""
    model = finetune(fold.train, out, config, start=pretrained)
    return score_requests(model, fold.test, view=config.view)


def collection_examples(
    index: SearchIndex, config: SearchConfig, *, seed: int
) -> list[TrainingExample]:
    """Make examples without any query: a title and a sentence of every document ask for its like.

    The source itself is no candidate. Grades between two labels are shared between them.

    Raises:
        DataError: no document has a title or a sentence.
    """
    random = np.random.default_rng(seed)
    writer = EvidenceWriter(index)
    places = {name: place for place, name in enumerate(index.ids)}
    requests: list[ScoreRequest] = []
    likeness: list[Floats] = []
    likeness_of_all: list[Floats] = []
    for place, (title, text) in enumerate(zip(index.titles, index.texts, strict=True)):
        sentences = _sentences(text)
        queries = [title] if title else []
        if sentences:
            queries.append(sentences[int(random.integers(len(sentences)))])
        for query in queries:
            request = writer.write_request(query, without=place)
            if not request.candidates:
                continue
            found = [places[str(candidate.id)] for candidate in request.candidates]
            source = index.word_weights[place]
            alike = np.asarray((index.word_weights[found] @ source.T).todense()).ravel()
            kept = _draw(alike, config, random)
            requests.append(_pick(view_request(request, config.view), kept))
            likeness.append(alike[kept])
            # Quantiles are those of whole lists, not of what was drawn from them.
            likeness_of_all.append(alike)
    if not requests:
        raise DataError("documents: should hold a title or a sentence to play a query")
    knots = np.asarray(
        np.quantile(np.concatenate(likeness_of_all), _GRADE_QUANTILES), dtype=np.float64
    )
    return [
        TrainingExample(
            request=request,
            labels=tuple(_soft_label(grade) for grade in _grades(alike, knots).tolist()),
        )
        for request, alike in zip(requests, likeness, strict=True)
    ]


def judged_examples(
    lists: Sequence[CandidateList], config: SearchConfig, *, seed: int
) -> list[TrainingExample]:
    """Make an example of every list: all of its higher grades and a draw from the zeros."""
    random = np.random.default_rng(seed)
    examples = []
    for one in lists:
        grades = np.array([grade or 0 for grade in one.grades])
        zeros = np.flatnonzero(grades == 0)
        drawn = random.permutation(zeros)[: config.unjudged_per_list]
        kept = random.permutation(np.concatenate([np.flatnonzero(grades > 0), drawn]))
        examples.append(
            TrainingExample(
                request=_pick(view_request(one.request, config.view), kept),
                labels=tuple(str(grade) for grade in grades[kept].tolist()),
            )
        )
    return examples


def _draw(alike: Floats, config: SearchConfig, random: np.random.Generator) -> Ints:
    """Choose the candidates most like the source and some of the others, in a drawn order."""
    order = np.argsort(-alike, kind="stable")
    first, others = order[: config.alike_per_list], order[config.alike_per_list :]
    drawn = random.permutation(others)[: config.drawn_per_list]
    return random.permutation(np.concatenate([first, drawn]))


def _pick(request: ScoreRequest, rows: Ints) -> ScoreRequest:
    return replace(request, candidates=tuple(request.candidates[row] for row in rows.tolist()))


def _sentences(text: str) -> list[str]:
    least, most = _SENTENCE_WORDS
    sentences = [sentence.strip() for sentence in text.split(". ")]
    return [sentence for sentence in sentences if least <= len(sentence.split()) <= most]


def _grades(alike: Floats, knots: Floats) -> Floats:
    # Documents without a word in common make equal knots, between which nothing can lie.
    return np.interp(alike, np.maximum.accumulate(knots + 1e-9 * np.arange(len(knots))), range(5))


def _soft_label(grade: float) -> dict[str, float]:
    low = min(int(grade), 3)
    return {str(low): 1 - (grade - low), str(low + 1): grade - low}


def _digest(content: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for one in content:
        digest.update(repr(one).encode())
    return digest.hexdigest()
