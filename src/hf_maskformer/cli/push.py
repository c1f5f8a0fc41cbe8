"""publish a training run on the Hugging Face Hub: model, code, recipe, metrics, samples, model card

hf-maskformer push runs/camvid OWNER/NAME --private
hf-maskformer push runs/camvid OWNER/NAME --license cc-by-4.0 --no-samples
"""

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="output_dir of a finished training run")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub; created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository for its owner only")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: the main one)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--no-samples", action="store_true", help="publish no pictures of evaluation images")


def run(arguments: Namespace) -> None:
    from hf_maskformer.hub.publish import push_run

    address = push_run(
        arguments.run_folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        license_id=arguments.license,
        samples=not arguments.no_samples,
    )
    print(f"published: {address}")
