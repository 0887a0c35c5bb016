"""Options of ``rankonce serve`` alone."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """``rankonce.serving.logs.LogFormat``, which imports what an extra brings."""

    TEXT = "text"
    JSON = "json"


HostOption = Annotated[
    str, typer.Option("--host", help="Address to listen on; see --api-keys for others.")
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")]
ServedModelNameOption = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        help="What clients call the model.",
        show_default="the checkpoint's name",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder for files and batches; without it there are none.",
        file_okay=False,
    ),
]
MaxBatchLinesOption = Annotated[
    int, typer.Option("--max-batch-lines", min=1, help="Lines of one batch.")
]
MaxFileMbOption = Annotated[
    int, typer.Option("--max-file-mb", min=1, help="Size of an uploaded file.")
]
BatchLinesInFlightOption = Annotated[
    int,
    typer.Option(
        "--batch-lines-in-flight",
        min=1,
        help="Lines of batches that wait for the model at one time, beside live questions.",
    ),
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="FOLDER|ID or NAME=FOLDER|ID",
        help="Folder in Hugging Face form, or id of a repository on the hub; several with "
        "names, of which requests choose one by the field model.",
        show_default="the embedded movie ranker",
    ),
]
AllowAdapterLoadingOption = Annotated[
    bool,
    typer.Option(
        "--allow-adapter-loading",
        help="Let clients load adapters from any folder here, and unload them.",
    ),
]
PrintEngineCommandOption = Annotated[
    bool,
    typer.Option(
        "--print-engine-command",
        help="Print the command that starts the engine's server, and end.",
    ),
]
MaxWaitMsOption = Annotated[
    float,
    typer.Option(min=0, help="How long a pass waits for questions that are being read."),
]
MaxQuestionsOption = Annotated[
    int, typer.Option(min=1, help="Questions under way; more are refused with 429.")
]
MaxQueueSOption = Annotated[
    float,
    typer.Option(min=0.1, help="Work before a question that may wait; more is a 429."),
]
TextThreadsOption = Annotated[
    int, typer.Option(min=1, help="Threads that tokenise and write answers.")
]
ResultCachePairsOption = Annotated[
    int,
    typer.Option(min=0, help="Keep the scores of so many pairs of prefix and candidate."),
]
PinTaskOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="Read its instruction at the start; may be repeated."),
]
MaxCandidatesOption = Annotated[
    int,
    typer.Option(
        "--max-candidates", min=1, help="Candidates, documents, items or prompts a question."
    ),
]
MaxBodyMbOption = Annotated[int, typer.Option("--max-body-mb", min=1, help="Size of a question.")]
MaxOpenBodyMbOption = Annotated[
    int,
    typer.Option("--max-open-body-mb", min=1, help="Size of all questions held at one time."),
]
HeaderTimeoutOption = Annotated[
    float,
    typer.Option("--header-timeout", min=0.1, help="Seconds for the head of a question."),
]
BodyTimeoutOption = Annotated[
    float,
    typer.Option(
        "--body-timeout", min=0.1, help="Seconds for its body, and one more every 100 kB."
    ),
]
WriteTimeoutOption = Annotated[
    float,
    typer.Option("--write-timeout", min=0.1, help="Seconds that an answer may lie unread."),
]
ApiKeysOption = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        exists=True,
        dir_okay=False,
        help="File of API keys, a line name:key or name:sha256:DIGEST each.",
        show_default="everybody may ask",
    ),
]
RequestsPerMinuteOption = Annotated[
    int | None,
    typer.Option(
        "--requests-per-minute",
        min=1,
        help="Of each key whose line says nothing else.",
        show_default="any number",
    ),
]
TokensPerMinuteOption = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-minute",
        min=1,
        help="Prompt tokens of each key whose line says nothing else.",
        show_default="any number",
    ),
]
OpenMetricsOption = Annotated[
    bool, typer.Option("--open-metrics", help="Let everybody read /metrics despite keys.")
]
LogFormatOption = Annotated[LogFormat, typer.Option("--log-format", help="Of the log on stderr.")]
LogBodiesOption = Annotated[
    bool, typer.Option("--log-bodies", help="Log what members wrote: questions, crashes.")
]
OtlpEndpointOption = Annotated[
    str | None,
    typer.Option(
        "--otlp-endpoint",
        metavar="URL",
        help="OpenTelemetry collector for traces, such as http://localhost:4318.",
        show_default="no traces",
    ),
]
WarmUpOption = Annotated[
    bool,
    typer.Option("--warm-up/--cold", help="Ask a question of every kind before /ready."),
]
DrainDelayOption = Annotated[
    float,
    typer.Option(
        "--drain-delay", min=0, help="Seconds to go on accepting, unready, after SIGTERM."
    ),
]
DrainTimeoutOption = Annotated[
    float,
    typer.Option("--drain-timeout", min=1, help="Seconds that running questions get then."),
]
