"""Publishing: a run's folder becomes a repository of the Hugging Face Hub, with a model card made from its JSON."""

from hf_maskformer.hub.card import model_card
from hf_maskformer.hub.publish import push_run

__all__ = ["model_card", "push_run"]
