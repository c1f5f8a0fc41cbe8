"""Sends a run to the Hugging Face Hub: model, processor, their code, recipe, metrics, samples and card.

The repository works without this package: `save_pretrained` puts the code of model and processor beside the weights,
and `trust_remote_code=True` loads it from there.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_maskformer.hub.card import card_of
from hf_maskformer.hub.run_record import METRICS_FILE, MODEL_FOLDER, RunRecord, read_run
from hf_maskformer.inference.checkpoint import load_checkpoint

RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
SAMPLES_FOLDER = "samples"
CURVES_FILE = "training_curves.png"
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
LOGIN = "run `hf auth login` or set HF_TOKEN to a token with write access"


def push_run(
    run: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    *,
    license_id: str | None = None,
    samples: bool = True,
) -> str:
    """Publish RUN/best as `repo_id` in one upload; returns the address of the commit.

    Everything that can be checked here is checked before the Hub is asked for anything. The repository is created
    where it does not exist; one that exists keeps its visibility and the files that are not written anew.

    Args:
        run: folder of a finished training run.
        repo_id: owner/name; a name alone goes to the owner of the token.
        private: create the repository for its owner only.
        revision: branch to upload to, created from the main one where it does not exist; None: the main one.
        license_id: licence of the weights as the Hub names it, such as "apache-2.0"; None: none is stated.
        samples: also publish pictures of evaluation images, with truth and prediction.

    Raises:
        ValueError: no such run, no whole model in its `best/`, a bad repository id or licence, no login, no right to
            write there, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    if license_id is not None and not LICENSE_ID.fullmatch(license_id):
        raise ValueError(f"license_id is {license_id!r}; it must be a name such as 'apache-2.0' or 'cc-by-4.0'")
    record = read_run(run)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_model(Path(run), folder)
        if get_token() is None:
            raise ValueError(f"not logged in to the Hugging Face Hub: {LOGIN}")
        api = HfApi()
        with hub_errors(repo_id, api.endpoint):
            repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        write_documents(Path(run), record, folder, repo_id, license_id=license_id, samples=samples)
        with hub_errors(repo_id, api.endpoint):
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload a training run", revision=revision
            )
    return str(commit.commit_url)


def write_model(run: Path, folder: Path) -> None:
    """Model, processor and their code, loaded first: what cannot be loaded here is not published.

    Raises:
        ValueError: RUN/best cannot be loaded.
    """
    model, processor = load_checkpoint(run / MODEL_FOLDER)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_documents(
    run: Path, record: RunRecord, folder: Path, repo_id: str, *, license_id: str | None, samples: bool
) -> None:
    """Recipe, metrics, samples, curves and card of the run, beside the model in `folder`."""
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(record.options, sort_keys=False, allow_unicode=True))
    (folder / METRICS_FILE).write_text(json.dumps(record.metrics, indent=2))
    pictures = {}
    sheet = sample_sheet(run, record) if samples else None
    if sheet is not None:
        pictures[f"{SAMPLES_FOLDER}/{sheet.name}"] = sheet
    if (run / CURVES_FILE).is_file():
        pictures[CURVES_FILE] = run / CURVES_FILE
    for name, path in pictures.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    in_card = tuple(name for name in pictures if name != CURVES_FILE)
    card = card_of(record, repo_id, license_id=license_id, samples=in_card)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


def sample_sheet(run: Path, record: RunRecord) -> Path | None:
    """The picture of evaluation images drawn with the weights in `best/`, where the run has one."""
    step = record.metrics.get("best_step")
    path = run / SAMPLES_FOLDER / f"step-{step:08d}.png" if isinstance(step, int) else None
    return path if path is not None and path.is_file() else None


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for what cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repository id {repo_id!r} cannot be used: it must be owner/name. {error}") from error


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the Hub or the way to it answers into a ValueError that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError(f"{endpoint} does not accept the token: {LOGIN}") from error
        if status == 403:
            raise ValueError(f"the token has no right to write {repo_id} at {endpoint}: {LOGIN}") from error
        raise ValueError(f"{endpoint} refused {repo_id}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"cannot publish {repo_id} while HF_HUB_OFFLINE is set") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how the upload of large files reports
        raise ValueError(f"{repo_id} was not published, {endpoint} could not be used: {error}") from error
