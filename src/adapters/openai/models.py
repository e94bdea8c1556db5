"""What the provider says of its models: whether one exists, and until when."""

from datetime import date

from openai import AsyncOpenAI
from openai.types import Model

from adapters.openai.errors import Exchange, ProviderFault, translated
from core.model.turn import TurnReason

SUNSET_WARNING_DAYS = 60

_NOT_FOUND = "model_not_found"


class KeyRefused(ProviderFault):
    """The provider does not take the key, or not for this."""

    def __init__(self, status: int | None) -> None:
        super().__init__(TurnReason.PROVIDER_CONFIG, status=status)


class ModelMissing(ProviderFault):
    """The provider does not have the model, or not for this key. `named`: it says so itself, in OpenAI's words;
    else it may be that it tells nobody what it has."""

    def __init__(self, status: int | None, code: str = "") -> None:
        super().__init__(TurnReason.PROVIDER_CONFIG, status=status, code=code)
        self.named = code == _NOT_FOUND


async def model_sunset(client: AsyncOpenAI, model: str) -> date | None:
    """Reads the day on which a model leaves the API, None if none is set.

    Raises KeyRefused, ModelMissing, and ProviderFault if the provider can't be asked.
    """
    try:
        with translated(Exchange()):
            found: object = await client.with_options(max_retries=2, timeout=10.0).models.retrieve(model)
    except ProviderFault as fault:
        if fault.status in (401, 403):
            raise KeyRefused(fault.status) from fault
        if fault.status == 404 or fault.code == _NOT_FOUND:
            raise ModelMissing(fault.status, fault.code) from fault
        raise
    if not isinstance(found, Model):  # the SDK hands on the text of a page of somebody in between
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
    day = found.shutdown_date
    try:
        return date.fromisoformat(day) if day else None
    except (TypeError, ValueError):
        return None  # compatible servers may say it in other ways


def sunset_warning(model: str, day: date | None, today: date) -> str | None:
    """A sentence for people if the model leaves the API in less than SUNSET_WARNING_DAYS days."""
    if day is None or (left := (day - today).days) >= SUNSET_WARNING_DAYS:
        return None
    if left < 0:
        return f"The model {model} left the API on {day.isoformat()}. Set OPENAI_MODEL to another one."
    days = "1 day" if left == 1 else f"{left} days"
    return f"The model {model} leaves the API on {day.isoformat()}, in {days}. Set OPENAI_MODEL to another one."
