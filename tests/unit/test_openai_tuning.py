"""No model is sent a parameter that it would refuse."""

import pytest

from adapters.openai.tuning import effort, verbosity
from doubles import definition


@pytest.mark.parametrize(
    ("model", "wish", "sent", "verbose"),
    [
        ("gpt-6-luna", "none", "none", "low"),
        ("gpt-6.1-terra", "none", "none", "low"),
        ("gpt-6.1-sol", "none", "low", "low"),
        ("gpt-6.2-astra", "high", "high", "low"),
        ("gpt-5-mini", "none", "minimal", "low"),
        ("gpt-5.1", "none", "none", "low"),
        ("gpt-4o", "none", "", ""),
        ("gpt-4.1-mini", "none", "", ""),
        ("o3", "none", "low", ""),
        ("llama3.3:70b", "none", "", ""),
        ("gpt-oss:20b", "low", "", ""),
    ],
)
def test_the_deployments_model_gets_what_it_takes(model: str, wish: str, sent: str, verbose: str) -> None:
    agent = definition(effort=wish, verbosity="low")
    assert (effort(agent, model), verbosity(agent, model)) == (sent, verbose)


def test_a_definition_that_names_its_model_is_taken_at_its_word() -> None:
    agent = definition(effort="high", verbosity="low", model="own-model")
    assert (effort(agent, "own-model"), verbosity(agent, "own-model")) == ("high", "low")
