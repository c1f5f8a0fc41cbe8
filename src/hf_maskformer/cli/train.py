"""train a model on a folder of images, from a recipe and flags

hf-maskformer train --recipe recipes/scenes.yaml --output-dir runs/scenes
hf-maskformer train --recipe recipes/camvid.yaml --dataset DIR --output-dir runs/camvid --max-minutes 30
hf-maskformer train --recipe recipes/camvid.yaml --dataset DIR --output-dir runs/camvid --push-to-hub OWNER/NAME

Every option of a run is a flag; a recipe (YAML) sets some of them, a flag wins over the recipe.
"""

from argparse import ArgumentParser, Namespace

from hf_maskformer.training.config import train_config
from hf_maskformer.training.flags import add_flags, parsed_flags


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE", help="YAML file with the options that differ from the defaults")
    add_flags(parser)


def run(arguments: Namespace) -> None:
    config = train_config(arguments.recipe, parsed_flags(arguments))
    from accelerate import PartialState

    from hf_maskformer.training.publishing import NotPublished
    from hf_maskformer.training.summary import summary_table
    from hf_maskformer.training.train import train

    try:
        summary = train(config)
    except NotPublished as error:  # raised by the main process only
        print(summary_table(error.summary, config.output_dir))
        raise
    if PartialState().is_main_process:
        print(summary_table(summary, config.output_dir))
