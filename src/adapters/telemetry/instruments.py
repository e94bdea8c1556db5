"""Everything that is measured, in one place. docs/observability.md says what each is for; a test compares."""

from opentelemetry.metrics import Histogram, Meter

_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 180, 300, 600)
"""Seconds that a turn or a part of it may take."""
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Seconds that this process and its database take."""
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5, 10, 30)
"""Seconds until somebody sees something."""
_TOKENS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
_CHANGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Instruments:
    """The metrics of a process. Attributes have few values: names of our own, never what a caller wrote."""

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
            return meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=list(buckets)
            )

        self.calls = seconds("rpc.server.call.duration", "Calls, to their status.", _LONG)
        self.accept = seconds("vida.accept.duration", "From a message to its commit.", _SHORT)
        self.refusals = meter.create_counter("vida.accept.refusals", "{message}", "Messages not accepted.")
        self.queue_wait = seconds("vida.turn.queue_wait", "From a message to the first claim of its turn.", _LONG)
        self.first_text = seconds("vida.turn.first_text", "From a claim to the first text committed.", _FIRST)
        self.turns = seconds("vida.turn.duration", "From a message to the end of its turn.", _LONG)
        self.taken_over = meter.create_counter(
            "vida.turns.taken_over", "{turn}", "Turns begun here that had been claimed before."
        )
        self.handed_over = meter.create_counter(
            "vida.turns.handed_over", "{turn}", "Turns left to another process at a stop."
        )
        for counter in (self.taken_over, self.handed_over):
            counter.add(0)  # so that the first one is seen as an increase
        self.running = meter.create_gauge("vida.turns.running", "{turn}", "Turns at work here.")
        self.operations = seconds(
            "gen_ai.client.operation.duration", "Rounds of the provider, with all retries.", _LONG
        )
        self.first_chunk = seconds(
            "gen_ai.client.operation.time_to_first_chunk", "From a round's begin to its first event.", _FIRST
        )
        self.tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of a round.",
            explicit_bucket_boundaries_advisory=list(_TOKENS),
        )
        self.retries = meter.create_counter("vida.provider.retries", "{request}", "Requests made again.")
        self.refusing = meter.create_gauge(
            "vida.provider.refusing", "1", "1 while the breaker is open and new messages are refused."
        )
        self.outages = meter.create_counter("vida.provider.outages", "{outage}", "Times that the breaker opened.")
        self.copies_left = meter.create_gauge(
            "vida.copies.left", "{object}", "Objects of erased threads that a provider still has."
        )
        self.tools = seconds("vida.tool.duration", "Calls of tools.", _LONG)
        self.commits = seconds("vida.commit.duration", "Commits of the record.", _SHORT)
        self.changes = meter.create_histogram(
            "vida.commit.changes",
            "{change}",
            "Changes that share a commit.",
            explicit_bucket_boundaries_advisory=list(_CHANGES),
        )
        self.followers = meter.create_gauge("vida.followers", "{follower}", "Streams that follow a turn here.")
        self.lag = meter.create_gauge(
            "vida.follower.lag", "{position}", "How far the slowest follower is behind its turn's log."
        )
        self.loop_lag = seconds("vida.event_loop.lag", "How late the event loop comes to what is due.", _SHORT)
