"""Several models behind one server: the field ``model`` chooses one, or an adapter over one.

Each model has an engine of its own, with its own queue, passes and caches. Adapters come and go
while questions run: one that leaves is found by no new question, and its weights go when the last
question that began before has its answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from rankonce.calibration import fingerprint_weights
from rankonce.errors import ModelError
from rankonce.model.loading import LoadedModel
from rankonce.ranker import Ranker
from rankonce.serving.answers import ModelCard
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.failures import ServingError, UnknownModelError
from rankonce.serving.schemas import LoadAdapterBody, PrefixBody, RankBody, UnloadAdapterBody

Answer = TypeVar("Answer")


class Question(Protocol):
    """What every question may say of who answers it."""

    @property
    def model(self) -> str | None: ...


@dataclass(kw_only=True, eq=False)
class _Served:
    """An engine and the questions that it answers now, each an event that is set at its end."""

    engine: Engine
    under_way: set[asyncio.Event] = field(default_factory=set)
    created: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, str | None] = field(default_factory=dict)

    @contextmanager
    def question(self) -> Iterator[None]:
        done = asyncio.Event()
        self.under_way.add(done)
        try:
            yield
        finally:
            self.under_way.discard(done)
            done.set()

    async def finish_questions(self) -> None:
        """Wait for those that have begun; later ones run on meanwhile."""
        for done in list(self.under_way):
            await done.wait()

    def note_names(self) -> None:
        now = int(time.time())
        names = (self.engine.model_name, *self.engine.adapter_names)
        self.created = {name: self.created.get(name, now) for name in names}
        self.fingerprints = {
            name: self.fingerprints[name] if name in self.fingerprints else self._fingerprint(name)
            for name in names
        }

    def _fingerprint(self, name: str) -> str | None:
        model = self.engine.ranker.model
        adapter = model.adapters.files.get(name)
        folder = Path(model.name) if adapter is None else adapter.folder
        if not folder.is_dir() or not isinstance(model, LoadedModel):
            return None
        try:
            return fingerprint_weights(folder)
        except ModelError:  # weights in another form than safetensors
            return None


class Models:
    """Answers every question with the model that it names.

    Args:
        rankers: one, or several by the names that clients call them; the first answers what names
            none. They belong to this object from then on.
        config: of each engine; ``served_model_name`` is for a single one.

    Raises:
        ModelError: two models or adapters have one name.
    """

    def __init__(self, rankers: Ranker | Mapping[str, Ranker], config: ServerConfig) -> None:
        if isinstance(rankers, Ranker):
            engines = [Engine(rankers, config)]
        else:
            engines = [
                Engine(ranker, replace(config, served_model_name=name))
                for name, ranker in rankers.items()
            ]
        self.config = config
        self._served = [_Served(engine=engine) for engine in engines]
        names = [name for one in engines for name in (one.model_name, *one.adapter_names)]
        for name in names:
            if names.count(name) > 1:
                raise ModelError(f"adapter: {name!r} is served twice; choose another name")
        for one in self._served:
            one.note_names()
        # One change at a time, so that each sees what the others left.
        self._changes = asyncio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer questions inside this context."""
        async with AsyncExitStack() as stack:
            for one in self._served:
                await stack.enter_async_context(one.engine.running())
            yield

    @property
    def engines(self) -> list[Engine]:
        """The engines, that of the first model first."""
        return [one.engine for one in self._served]

    @property
    def model_name(self) -> str:
        """The name of what answers questions that name no model."""
        return self.engines[0].model_name

    @property
    def names(self) -> list[str]:
        """What ``model`` can be."""
        return [name for one in self.engines for name in (one.model_name, *one.adapter_names)]

    @property
    def cards(self) -> dict[str, ModelCard]:
        """Describe every model and adapter, by name."""
        return {
            name: ModelCard(
                id=name,
                created=created,
                max_model_len=one.engine.ranker.model.max_prompt_tokens,
                parent=None if name == one.engine.model_name else one.engine.model_name,
                fingerprint=one.fingerprints[name],
            )
            for one in self._served
            for name, created in one.created.items()
            if name == one.engine.model_name or name in one.engine.adapter_names
        }

    def find(self, model: str | None) -> Engine:
        """Find the engine of a model or adapter.

        Raises:
            ServingError: there is no such model.
        """
        return self._find(model).engine

    async def ask(
        self,
        method: Callable[..., Awaitable[Answer]],
        body: Question,
        *,
        cache_salt: str | None = None,
    ) -> Answer:
        """Answer a question with the engine of the model that it names.

        Args:
            method: of ``Engine``, which answers such a body.
            cache_salt: as the engine takes it.

        Raises:
            ServingError: there is no such model or adapter, or the engine refuses.
        """
        served = self._find(body.model)
        if isinstance(body, RankBody | PrefixBody):
            adapters = served.engine.ranker.model.adapters
            if body.adapter in adapters.leaving:
                raise UnknownModelError("adapter", str(body.adapter), self.names)
        with served.question():
            return await method(served.engine, body, cache_salt=cache_salt)

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Let no adapter come or go inside this context; whoever asks for it waits."""
        async with self._changes:
            yield

    async def load_adapter(self, body: LoadAdapterBody) -> str:
        """Load an adapter; questions find it when this is done.

        Raises:
            ServingError: loading is not allowed, the name is taken, or the adapter does not fit.
        """
        self._check_allowed()
        async with self._changes:
            served = self._find(body.model)
            if body.lora_name in self.names:
                if not body.load_inplace or body.lora_name not in served.engine.adapter_names:
                    raise ServingError(400, f"lora_name: {body.lora_name!r} is served already")
                await self._unload(served, body.lora_name)
            try:
                await served.engine.load_adapter(body.lora_name, body.lora_path)
            except (ModelError, OSError) as error:
                reason = str(error).removeprefix("adapter: ")
                raise ServingError(400, f"lora_path: {reason}") from error
            finally:
                served.note_names()
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    async def unload_adapter(self, body: UnloadAdapterBody) -> str:
        """Forget an adapter when the questions that may use it are answered.

        Raises:
            ServingError: loading is not allowed, or there is no such adapter.
        """
        self._check_allowed()
        async with self._changes:
            for served in self._served:
                if body.lora_name in served.engine.adapter_names:
                    if body.lora_name == served.engine.ranker.config.adapter:
                        raise ServingError(
                            400, "lora_name: is what answers questions that name no adapter"
                        )
                    await self._unload(served, body.lora_name)
                    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        adapters = [name for one in self.engines for name in one.adapter_names]
        raise UnknownModelError("lora_name", body.lora_name, adapters)

    async def _unload(self, served: _Served, name: str) -> None:
        adapters = served.engine.ranker.model.adapters
        adapters.leaving |= {name}
        try:
            await served.finish_questions()
        except asyncio.CancelledError:  # nobody waits for it any more: it stays
            adapters.leaving -= {name}
            raise
        await served.engine.unload_adapter(name)
        served.note_names()

    def _check_allowed(self) -> None:
        if not self.config.allow_adapter_loading:
            raise ServingError(
                403,
                "adapters are loaded and unloaded only where the server was started with "
                "--allow-adapter-loading",
                code="adapter_loading_not_allowed",
            )

    def _find(self, model: str | None) -> _Served:
        if model is None:
            return self._served[0]
        for one in self._served:
            if model == one.engine.model_name or model in one.engine.adapter_names:
                return one
        raise UnknownModelError("model", model, self.names)
