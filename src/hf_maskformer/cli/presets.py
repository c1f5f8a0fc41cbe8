"""list the presets: name, what it is, the paper

hf-maskformer presets
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show the whole configuration of this preset instead")


def run(arguments: Namespace) -> None:
    from hf_maskformer.presets import PRESETS, list_presets, preset

    if arguments.name is not None:
        print(preset(arguments.name).to_json_string(use_diff=False))
        return
    width = max(map(len, list_presets()))
    for name in list_presets():
        print(f"{name.ljust(width)}  {PRESETS[name].summary} ({PRESETS[name].paper})")
