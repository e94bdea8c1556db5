"""What the practice coach keeps of a conversation: nothing."""

from core.ports.provider_copies import ProviderCopies


class NoCopies(ProviderCopies):
    """There is nothing to delete."""

    @property
    def provider(self) -> str:
        return "practice"

    async def erase(self, ref: str) -> None:
        """It is gone: it never was."""
