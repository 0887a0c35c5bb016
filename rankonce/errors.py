"""Everything that RankOnce raises for input it cannot use.

RankOnceError
├── RequestError            a request: unknown field, empty candidates, an event without time
│   └── PromptTooLongError  prefix and segment do not fit the model
├── TaskError               a task file, or the name of a task nobody defined
│   └── LabelError          a label that is not one token of the tokenizer
├── ModelError              a checkpoint that cannot be loaded or cannot run packed
├── NumericsError           NaN or infinity where a score should be
├── ShapeError              a tensor handed to a kernel with another shape or dtype
├── DataError               rows of a dataset or the input of a metric
├── TrainingError           a recipe or a run that cannot go on
├── ExperimentError         an experiment's file, or a folder that another experiment uses
├── OperationsError         a file of API keys, or an address that a server cannot report to
├── ClusterError            a Ray cluster that cannot be reached, or whose workers give up
├── ServerError             what a server answered to our client instead of scores
├── EngineError             another engine that is not there, or answers something else than scores
└── MissingDependencyError  a library that belongs to an extra

Every message names the field and what would be right.
"""


class RankOnceError(Exception):
    """Root of the tree; the command line prints its message and exits with 1."""


class RequestError(RankOnceError):
    """A request that cannot be scored as it stands."""


class PromptTooLongError(RequestError):
    """A prefix and segment longer than the model's context."""


class TaskError(RankOnceError):
    """A task file with a fault, or an unknown task."""


class LabelError(TaskError):
    """A label that the model's tokenizer splits, or that two labels share."""


class ModelError(RankOnceError):
    """A checkpoint that cannot be loaded, is not decoder-only or cannot run packed."""


class NumericsError(RankOnceError):
    """A forward pass that gave NaN or infinity."""


class ShapeError(RankOnceError):
    """A tensor whose shape or dtype is not what the operation takes."""


class DataError(RankOnceError):
    """Rows or arrays that do not have the columns, lengths or values needed."""


class TrainingError(RankOnceError):
    """A training run that cannot start or go on."""


class ServerError(RankOnceError):
    """A server that refused a question, failed, or could not be reached.

    Args:
        status: of the answer; ``None`` where there was none.
        code: the server's own word for the reason.
        param: the field at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ClusterError(RankOnceError):
    """A cluster that cannot be reached, or that cannot finish its work."""


class EngineError(RankOnceError):
    """Another inference engine that is not installed, does not start, answer or give scores."""


class ExperimentError(RankOnceError):
    """An experiment that cannot be planned or go on."""


class OperationsError(RankOnceError):
    """What the operator of a server gave it and it cannot use."""


class MissingDependencyError(RankOnceError):
    """A library that is only installed with an extra.

    Args:
        library: the missing distribution.
        extra: the extra of RankOnce that brings it.
    """

    def __init__(self, library: str, *, extra: str) -> None:
        super().__init__(f"{library} is not installed: pip install 'rankonce[{extra}]'")
