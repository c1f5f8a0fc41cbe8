"""train a model on a folder of images, from a recipe and flags

hf-maskformer train --recipe recipes/scenes.yaml --output-dir runs/scenes
hf-maskformer train --recipe recipes/camvid.yaml --dataset DIR --output-dir runs/camvid --max-minutes 30

Every option of a run is a flag; a recipe (YAML) sets some of them, a flag wins over the recipe.
"""

from argparse import ArgumentParser, Namespace

from hf_maskformer.training.config import add_flags, parsed_flags, train_config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE", help="YAML file with the options that differ from the defaults")
    add_flags(parser)


def run(arguments: Namespace) -> None:
    config = train_config(arguments.recipe, parsed_flags(arguments))
    from hf_maskformer.training.trackers import scalars
    from hf_maskformer.training.train import train

    for name, value in scalars(train(config)).items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 4)}")
    print(f"saved: {config.output_dir}/best and {config.output_dir}/final")
