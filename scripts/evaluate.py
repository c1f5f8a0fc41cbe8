"""The same as `hf-maskformer evaluate`: python scripts/evaluate.py --help"""

import sys

from hf_maskformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
