"""A look at the models in use, once a day while the service runs: until when the provider has them."""

import asyncio
import logging
import random
from collections.abc import Sequence

from openai import AsyncOpenAI

from adapters.openai.errors import ProviderFault
from adapters.openai.models import KeyRefused, ModelMissing, model_sunset, sunset_warning
from adapters.openai.retry import Sleep
from core.ports.system import Clock

DAY = 86_400.0
"""Seconds between two looks."""
RETRY = 3_600.0
"""Seconds until another look where a model could not be asked for."""

_JITTER = 0.1
_PATIENCE = 60.0
"""Seconds for one model, retries and a provider that answers byte by byte included."""

logger = logging.getLogger(__name__)


class ModelWatch:
    """Warns in the log where a model leaves soon or is gone, or where the key is refused.

    It never fails, and holds up nobody. A provider that can't be asked is logged once, until it answers again.
    Nothing is logged but the names of models, dates, reasons and status codes.
    """

    def __init__(
        self, client: AsyncOpenAI, models: Sequence[str], clock: Clock, sleep: Sleep = asyncio.sleep
    ) -> None:
        self._client = client
        self._models = models
        self._clock = clock
        self._sleep = sleep
        self._silent: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins with a look, in the background."""
        self._task = asyncio.create_task(self._run(), name="model-watch")

    async def stop(self) -> None:
        """Ends it, whatever it is waiting for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            for model in self._models:
                await self._look(model)
            pause = RETRY if self._silent else DAY
            await self._sleep(pause * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 - spreads load

    async def _look(self, model: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                day = await model_sunset(self._client, model)
        except KeyRefused as fault:
            logger.warning(
                "the provider refuses the key, or does not let it see the model: model=%s status=%s",
                model,
                fault.status,
            )
        except ModelMissing as fault:
            if not fault.named:
                return self._unasked(model, "it does not know of it", fault.status)
            logger.warning("the provider does not have the model %s, or not for this key", model)
        except ProviderFault as fault:
            return self._unasked(model, fault.reason.value, fault.status)
        except Exception as error:  # noqa: BLE001 - its text may hold a secret, its type does not
            return self._unasked(model, type(error).__name__, None)
        else:
            if (warning := sunset_warning(model, day, self._clock.now().date())) is not None:
                logger.warning("%s", warning)
        self._silent.discard(model)
        return None

    def _unasked(self, model: str, reason: str, status: int | None) -> None:
        if model not in self._silent:
            self._silent.add(model)
            logger.info(
                "the provider can't be asked about a model: model=%s reason=%s status=%s", model, reason, status
            )
