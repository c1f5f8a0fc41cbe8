"""The same as `hf-maskformer train`: python scripts/train.py --help"""

import sys

from hf_maskformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
