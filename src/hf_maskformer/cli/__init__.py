"""The command line `hf-maskformer`: one file per verb."""
