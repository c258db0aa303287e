"""What the experiments train and score on."""
