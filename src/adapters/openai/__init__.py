"""The coach's replies from OpenAI, or from any server that speaks its Responses API."""

from adapters.openai.agent import OpenAIAgent
from adapters.openai.client import make_client
from adapters.openai.copies import OpenAICopies
from adapters.openai.memory import StateMode
from adapters.openai.models import KeyRefused, ModelMissing, model_sunset, sunset_warning
from adapters.openai.watch import ModelWatch

__all__ = [
    "KeyRefused",
    "ModelMissing",
    "ModelWatch",
    "OpenAIAgent",
    "OpenAICopies",
    "StateMode",
    "make_client",
    "model_sunset",
    "sunset_warning",
]
