"""The built-in practice coach: a real conversation without a key, a network or a model."""

from adapters.practice.agent import PracticeAgent

__all__ = ["PracticeAgent"]
