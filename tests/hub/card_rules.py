"""What the Hub's documentation asks of the head of a model card, as far as our cards use it.

The Hub's own validator runs there and cannot be asked here. These are the rules of
https://huggingface.co/docs/hub/model-cards and of the specification in huggingface/hub-docs (modelcard.md): a licence
and a pipeline from its lists (here only those that a test uses and a few more), ids of repositories for data sets and
base models, and a model index whose results name task, data set and metrics.
"""

import re
from collections.abc import Mapping

import yaml

LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "other"}
PIPELINES = {"image-segmentation", "mask-generation", "object-detection"}
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


def card_problems(text):
    """One sentence for each rule that the card breaks."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return ["the card must begin with YAML between two lines of ---"]
    try:
        head = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the head is no YAML: {error}"]
    if not isinstance(head, Mapping):
        return ["the head must be a mapping"]
    problems = []
    if "license" in head and head["license"] not in LICENSES:
        problems.append(f'"license" must be one of {sorted(LICENSES)}')
    if "pipeline_tag" in head and head["pipeline_tag"] not in PIPELINES:
        problems.append(f'"pipeline_tag" must be one of {sorted(PIPELINES)}')
    tags = head.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be a list of strings')
    for name in ("datasets", "base_model"):
        ids = head.get(name) or []
        for one in [ids] if isinstance(ids, str) else ids:
            if not isinstance(one, str) or REPO_ID.fullmatch(one) is None:
                problems.append(f'"{name}" must hold ids of the Hub, not {one!r}')
    return problems + [problem for model in head.get("model-index", []) for problem in index_problems(model)]


def index_problems(model):
    if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
        return ['"model-index" needs a name and a list of results']
    problems = []
    for result in model["results"]:
        required = {"task": ("type",), "dataset": ("type", "name")}
        for part, names in required.items():
            values = result.get(part, {})
            problems += [f'"model-index": {part}.{name} is missing' for name in names if not values.get(name)]
        for metric in result.get("metrics") or [{}]:
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                problems.append(f'"model-index": a metric needs a type and a number, not {metric}')
    return problems
