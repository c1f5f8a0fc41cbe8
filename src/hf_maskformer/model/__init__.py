"""The model, its configuration and its image processor: flat files that travel to the Hub with a checkpoint."""
