"""The same as `hf-maskformer predict`: python scripts/predict.py --help"""

import sys

from hf_maskformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
