"""The same as `hf-maskformer push`: python scripts/push_to_hub.py --help"""

import sys

from hf_maskformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
