"""Training, evaluation and ablations; what they found is in LOG.md."""
