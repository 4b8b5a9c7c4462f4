"""The continual run: configuration, the loop over transformers.Trainer, checkpoint and resume."""
