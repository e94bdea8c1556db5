"""The pure core: model, ports and use cases. Imports the standard library and nothing else."""
