"""`hf-maskformer VERB ...`: parse, call, and turn a user's mistake into one line and exit code 2.

The verbs' modules import training, data and evaluation only when they run. torch and transformers are imported with
the package, which registers the Auto classes: that is what `--help` waits for.
"""

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence

from hf_maskformer.cli import evaluate, export, inspect_dataset, predict, presets, push, quickstart, replay, train

VERBS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "push": push,
    "inspect-dataset": inspect_dataset,
    "presets": presets,
    "quickstart": quickstart,
    "replay": replay,
}
USER_ERROR, RUN_ERROR, INTERRUPTED = 2, 1, 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-maskformer", description="Train and use MaskFormer models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        verb.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        module.add_arguments(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for input that cannot be used, 1 for a run that failed."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_option(parser, arguments.verb, unknown))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_maskformer").setLevel(logging.INFO)
    quiet_libraries()
    try:
        VERBS[arguments.verb].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if arguments.debug or code is None:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return code
    return 0


def unknown_option(parser: argparse.ArgumentParser, verb: str, unknown: Sequence[str]) -> str:
    """What argparse did not understand, with the verb's nearest option."""
    wrong = next((word for word in unknown if word.startswith("--")), None)
    if wrong is None:
        return f"unexpected argument {unknown[0]!r} after {verb}"
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    options = list(verbs.choices[verb]._option_string_actions)
    nearest = difflib.get_close_matches(wrong.partition("=")[0], options, n=1, cutoff=0.0)[0]
    return f"unknown option {wrong}; the nearest one of {verb} is {nearest}"


def quiet_libraries() -> None:
    """No bars of the libraries between ours: writing a model and indexing a dataset take a second."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()


def exit_code(error: Exception) -> int | None:
    """2: the user's input; 1: a training run that became non-finite; None: a fault of this code."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, (ValueError, OSError, StrictDataclassError)):
        return USER_ERROR
    return RUN_ERROR if isinstance(error, FloatingPointError) else None


def one_line(error: Exception) -> str:
    """The message on one line; torch wraps an error of a data loader process in that process's traceback."""
    text = str(error).strip()
    if "DataLoader worker process" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
