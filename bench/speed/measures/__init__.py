"""The measures, one idea each."""
