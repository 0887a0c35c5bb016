"""Adapters over a shared backbone: low-rank weights, one set a domain, of which a pass uses one.

The idea is MLoRA's (Yang et al. 2024): domains share a model and keep what is their own in a few
weights. Adapters are PEFT's, in its files and its layers, so that PEFT trains, loads and merges
them as well.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from rankonce.errors import MissingDependencyError, ModelError
from rankonce.model.precision import import_bitsandbytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT puts in front of the name of every weight in its files.
_FILE_PREFIX = "base_model.model."
# Settings of PEFT by which an adapter replaces whole modules; the head and the tokens' embeddings
# are read outside the layers and would stay those of the backbone.
_WHOLE_MODULES = ("modules_to_save", "trainable_token_indices")


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter as it lies in a folder.

    Attributes:
        base: the checkpoint that it was trained over, as it was called then.
        fingerprint: of that checkpoint's weights, where the run record says it.
        tasks: names of the tasks that it learnt, where the run record says it.
    """

    name: str
    folder: Path
    base: str | None
    fingerprint: str | None = None
    tasks: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """What PEFT calls it; a name that is part of a module's path would confuse it there."""
        return f"adapter-{self.name}"

    def find_base(self) -> str:
        """Return the checkpoint that it was trained over.

        Raises:
            ModelError: the adapter does not say which, or it is a folder that is no longer there.
        """
        if not self.base:
            raise ModelError(
                f"adapter: {self.folder / CONFIG_FILE} names no base_model_name_or_path; load the "
                "backbone and give this as an adapter of it"
            )
        if Path(self.base).is_absolute() and not Path(self.base).is_dir():
            raise ModelError(
                f"adapter: {self.folder} was trained over {self.base}, which is not there; load "
                "the backbone from where it is and give this as an adapter of it"
            )
        return self.base


@dataclass(kw_only=True)
class Adapters:
    """The adapters of a network and which of them its passes run with.

    Attributes:
        files: by name.
        active: ``None`` is the backbone alone.
        leaving: those that no task chooses any more, since they are about to be removed.
    """

    files: Mapping[str, AdapterFiles] = field(default_factory=dict)
    active: str | None = None
    leaving: frozenset[str] = frozenset()
    _layers: Sequence[Any] = ()

    def use(self, name: str | None) -> None:
        """Run the passes that follow with an adapter, or with the backbone alone."""
        if name == self.active:
            return
        for layer in self._layers:
            if name is None:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter(self.files[name].key, inference_mode=True)
        self.active = name

    def of_task(self, task: str) -> list[str]:
        """Return the names of the adapters that learnt a task."""
        return [
            name
            for name, files in self.files.items()
            if task in files.tasks and name not in self.leaving
        ]

    def add(self, network: Any, files: AdapterFiles) -> None:
        """Put one more adapter into a network that is not accelerated; no pass may run meanwhile.

        Raises:
            ModelError: it does not fit; whatever is raised, the network is as before.
        """
        try:
            load_adapter(network, files)
        except Exception:
            if files.key in getattr(network, "peft_config", {}):
                network.delete_adapter(files.key)
            self._settle(network)
            raise
        self.files = {**self.files, files.name: files}
        self._settle(network)

    def remove(self, network: Any, name: str) -> None:
        """Take an adapter's weights out of a network; no pass may run meanwhile."""
        network.delete_adapter(self.files[name].key)
        self.files = {other: files for other, files in self.files.items() if other != name}
        self.leaving -= {name}
        self._settle(network)

    def _settle(self, network: Any) -> None:
        """Use again what was in use: PEFT chooses for itself whenever its adapters change."""
        self._layers = adapted_layers(network)
        wanted = self.active if self.active in self.files else None
        self.active = ""  # no adapter's name
        self.use(wanted)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    folder = Path(folder)
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: str | Path, *, name: str) -> AdapterFiles:
    """Look at an adapter's files.

    Raises:
        ModelError: names the file that is missing or no adapter of this kind.
    """
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ModelError(f"adapter: a name should be of letters, digits, - and _, is {name!r}")
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ModelError(f"adapter: {folder} has no {file}; should be an adapter in PEFT form")
    config = _read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"adapter: {folder} should be LORA, is {config.get('peft_type')}")
    record = _read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    return AdapterFiles(
        name=name,
        folder=folder,
        base=config.get("base_model_name_or_path"),
        fingerprint=record.get("base"),
        tasks=frozenset(record.get("tasks", ())),
    )


def add_adapters(network: Any, adapters: Mapping[str, str | Path], *, base: str) -> Adapters:
    """Put adapters beside the linear layers of a network that is not accelerated yet.

    Args:
        network: the backbone, in any precision but FP8.
        adapters: folders by the name that requests choose them by.
        base: where the backbone came from.

    Returns:
        The adapters, with the first of them in use.

    Raises:
        ModelError: an adapter cannot be read, belongs to another backbone or changes more than
            linear layers.
    """
    files = {name: read_adapter(folder, name=name) for name, folder in adapters.items()}
    if not files:
        return Adapters()
    actual = fingerprint_base(base)
    for one in files.values():
        check_base(one, base, actual)
        load_adapter(network, one)
    added = Adapters(files=files, _layers=adapted_layers(network))
    added.use(next(iter(files)))
    return added


def adapted_layers(network: Any) -> list[Any]:
    """Return the layers that have an adapter.

    Raises:
        ModelError: the head or the embeddings are among them; they are read outside of the layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    outside = (network.get_output_embeddings(), network.get_input_embeddings())
    if any(module is layer for module in outside for layer in layers):
        raise ModelError(
            "adapter: changes the head or the embeddings, which passes read from the backbone; "
            "should be beside layers of the decoder"
        )
    return layers


def check_base(files: AdapterFiles, base: str, fingerprint: str | None) -> None:
    """Refuse an adapter of another backbone, where its run record says which it was trained over.

    Raises:
        ModelError: names both.
    """
    if None not in (files.fingerprint, fingerprint) and files.fingerprint != fingerprint:
        raise ModelError(
            f"adapter: {files.folder} was trained over {files.base}, whose weights are not those "
            f"of {base}"
        )


def load_adapter(network: Any, files: AdapterFiles, *, trainable: bool = False) -> None:
    """Add one adapter to a network and use it.

    Args:
        trainable: its weights go on learning.

    Raises:
        ModelError: its weights are not those of the network's layers.
    """
    try:
        from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise MissingDependencyError(error.name or "peft", extra="train") from error

    config = PeftConfig.from_pretrained(str(files.folder))
    for setting in _WHOLE_MODULES:
        if getattr(config, setting, None):
            raise ModelError(
                f"adapter: {files.folder} replaces whole modules ({setting}); merge it into a "
                "checkpoint (rankonce merge)"
            )
    config.inference_mode = not trainable
    weights = read_weights(files)
    try:
        inject_adapter(network, config, files.key)
        set_peft_model_state_dict(network, dict(weights), adapter_name=files.key)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"adapter: {files.folder} does not fit {type(network).__name__}: {reason}"
        ) from error
    loaded = get_peft_model_state_dict(network, adapter_name=files.key, save_embedding_layers=False)
    check_complete(files, weights, loaded)
    if not trainable:
        network.requires_grad_(False)
        network.eval()


def inject_adapter(network: Any, config: Any, key: str) -> None:
    """Put an adapter beside the layers that its configuration names, and use it.

    Args:
        config: PEFT's.
        key: what PEFT calls the adapter.

    Raises:
        ValueError: PEFT finds no such layers.
        ModelError: the head or the embeddings are among them.
    """
    # PEFT imports it where it is installed, whatever the layers are.
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    with warnings.catch_warnings():
        # That there are several adapters is what we want.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        # PEFT writes such patterns itself, for experts that the adapter leaves alone.
        warnings.filterwarnings("ignore", "The following .*_pattern keys .*gate_up_proj")
        network.add_adapter(config, key)
    adapted_layers(network)


def read_weights(files: AdapterFiles) -> dict[str, Tensor]:
    """Read an adapter's weights by the names of the network's modules.

    Raises:
        ModelError: the file is broken.
    """
    try:
        weights = load_file(files.folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"adapter: {files.folder / WEIGHTS_FILE} is broken: {error}") from error
    return {name.removeprefix(_FILE_PREFIX): weight for name, weight in weights.items()}


def check_complete(
    files: AdapterFiles, weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> None:
    """Refuse files of which a part found no place, or that leave layers at random numbers.

    Raises:
        ModelError: names the first weight.
    """
    names = {name.removeprefix(_FILE_PREFIX) for name in loaded}
    for name in sorted(names ^ set(weights)):
        fault = "lacks" if name in names else "has a weight that no layer takes:"
        raise ModelError(f"adapter: {files.folder / WEIGHTS_FILE} {fault} {name}")


def fingerprint_base(source: str) -> str | None:
    """Identify a checkpoint by the names, shapes and first rows of all its weights.

    Whole files of a large backbone take longer to hash than to load. The number formats do not
    count, nor how weights are spread over files.

    Args:
        source: folder or id of a repository, whose weights are downloaded if they were not yet.

    Returns:
        A SHA-256, ``None`` for a checkpoint without safetensors.

    Raises:
        ModelError: there is no such folder or repository.
    """
    rows: dict[str, bytes] = {}
    for path in _weight_files(source):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a file is no mapping
                shape = file.get_slice(name).get_shape()
                row = file.get_slice(name)[:1] if len(shape) > 1 else file.get_tensor(name)
                content = f"{name} {shape}".encode() + row.float().numpy().tobytes()
                rows[name] = hashlib.sha256(content).digest()
    if not rows:
        return None
    return hashlib.sha256(b"".join(rows[name] for name in sorted(rows))).hexdigest()


def _weight_files(source: str) -> list[Path]:
    def find(name: str) -> Path | None:
        if Path(source).is_dir():
            path = Path(source) / name
            return path if path.is_file() else None
        try:
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"model: {source} cannot be loaded: {reason}") from error
        return Path(found) if found else None

    if index := find("model.safetensors.index.json"):
        shards = sorted(set(_read_json(index)["weight_map"].values()))
        return [path for shard in shards if (path := find(shard))]
    single = find("model.safetensors")
    return [single] if single else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"adapter: {path} should hold an object")
    return content
