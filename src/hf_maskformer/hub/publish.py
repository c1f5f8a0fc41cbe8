"""Sends a run to the Hugging Face Hub: model, processor, their code, recipe, metrics, curves, samples and card.

The repository works without this package: `save_pretrained` puts the code of model and processor beside the weights,
and `trust_remote_code=True` loads it from there.
"""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from hf_maskformer.hub.card import card_of
from hf_maskformer.hub.repository import CARD_FILE, check_repo_id, open_repository, upload
from hf_maskformer.hub.run_record import METRICS_FILE, MODEL_FOLDER, RunRecord, read_run
from hf_maskformer.inference.checkpoint import load_checkpoint

RECIPE_FILE = "recipe.yaml"
SAMPLES_FOLDER = "samples"
CURVES_FILE = "training_curves.png"
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


def push_run(
    run: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    *,
    license_id: str | None = None,
    samples: bool = True,
) -> str:
    """Publish RUN/best as `repo_id` in one commit; returns the address of the commit.

    Everything that can be checked here is checked before the Hub is asked for anything. The repository is created
    where it does not exist; one that exists keeps its visibility. There the weights, pictures and card of an earlier
    push are replaced, other files stay.

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
        repo_id = open_repository(repo_id, private=private, revision=revision)
        write_documents(Path(run), record, folder, repo_id, license_id=license_id, samples=samples)
        return upload(folder, repo_id, message="Upload a training run", revision=revision)


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
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(record.options, sort_keys=False))
    (folder / METRICS_FILE).write_text(json.dumps(record.metrics, indent=2))
    sheet = sample_sheet(run, record) if samples else None
    shown: tuple[str, ...] = ()
    if sheet is not None:
        shown = (f"{SAMPLES_FOLDER}/{sheet.name}",)
        (folder / SAMPLES_FOLDER).mkdir()
        shutil.copyfile(sheet, folder / SAMPLES_FOLDER / sheet.name)
    curves = CURVES_FILE if (run / CURVES_FILE).is_file() else None
    if curves is not None:
        shutil.copyfile(run / curves, folder / curves)
    card = card_of(record, repo_id, license_id=license_id, samples=shown, curves=curves)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


def sample_sheet(run: Path, record: RunRecord) -> Path | None:
    """The picture of evaluation images drawn with the weights in `best/`, where the run has one."""
    step = record.metrics.get("best_step")
    path = run / SAMPLES_FOLDER / f"step-{step:08d}.png" if isinstance(step, int) else None
    return path if path is not None and path.is_file() else None
