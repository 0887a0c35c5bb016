"""What is known of a model without its weights: its tokenizer, its vocabulary, its bounds.

Prompts need no more, wherever the weights are: in this process or in another engine.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankonce.errors import ModelError
from rankonce.layout import TokenizedRequest
from rankonce.model.adapters import Adapters
from rankonce.model.sources import names_folder

# What transformers raises for files that are missing, broken or hold values that make no sense.
UNUSABLE_FILES = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model as prompts see it.

    Attributes:
        tokenizer: the checkpoint's fast tokenizer.
        max_prompt_tokens: the longest prompt that it reads.
        name: how the checkpoint was asked for.
        num_vocabulary: tokens that it has rows for.
        adapters: those over the network, and which of them is in use.
    """

    tokenizer: Any
    max_prompt_tokens: int
    name: str
    num_vocabulary: int
    adapters: Adapters = field(default_factory=Adapters)

    def check_ids(self, request: TokenizedRequest) -> None:
        """Refuse tokens that the tokenizer knows and the checkpoint has no embedding of.

        Raises:
            ModelError: names the token.
        """
        parts = (request.prefix_ids, *request.segment_ids, *request.label_ids)
        largest = max(max(ids) for ids in parts if ids)
        if largest >= self.num_vocabulary:
            raise ModelError(
                f"tokenizer: has token {largest}, "
                f"{self.tokenizer.convert_ids_to_tokens(largest)!r}, but the checkpoint has rows "
                f"for {self.num_vocabulary} tokens only; they do not belong together"
            )


def read_known_model(name: str | Path, *, trust_remote_code: bool = False) -> KnownModel:
    """Read a checkpoint's configuration and tokenizer, not its weights.

    Args:
        name: folder in Hugging Face form, or the id of a repository on the hub.
        trust_remote_code: run tokenizer code that comes with the checkpoint.

    Raises:
        ModelError: there is no such checkpoint, or it is not a decoder-only model.
    """
    source = str(name)
    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_decoder_only(source, config, trust_remote_code)
        tokenizer = load_tokenizer(source, trust_remote_code)
    except UNUSABLE_FILES as error:
        raise ModelError(f"model: {source} cannot be read: {first_line(error)}") from error
    text_config = config.get_text_config()
    return KnownModel(
        tokenizer=tokenizer,
        max_prompt_tokens=getattr(text_config, "max_position_embeddings", None) or 2**31,
        name=source,
        num_vocabulary=text_config.vocab_size,
    )


def check_source(source: str) -> None:
    """Refuse a path that holds no checkpoint.

    Raises:
        ModelError: names it.
    """
    if names_folder(source) and not (Path(source) / "config.json").is_file():
        raise ModelError(f"model: {source} has no config.json; should be a Hugging Face checkpoint")


def load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ModelError: it has none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except UNUSABLE_FILES as error:
        raise ModelError(
            f"tokenizer: {source} has none that can be loaded: {first_line(error)}"
        ) from error


def check_decoder_only(source: str, config: Any, trust_remote_code: bool) -> None:
    """Refuse what is not a decoder-only language model.

    Raises:
        ModelError: names what it is.
    """
    classes = config.architectures or []
    own_code = getattr(config, "auto_map", None) or {}
    is_known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        trust_remote_code and "AutoModelForCausalLM" in own_code
    )
    decoder_only = (
        not config.is_encoder_decoder
        and is_known
        and all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    )
    if not decoder_only:
        raise ModelError(
            f"model: {source} is {', '.join(classes) or config.model_type}; should be a "
            "decoder-only language model (…ForCausalLM)"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
