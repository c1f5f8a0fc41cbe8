"""The same as `hf-maskformer quickstart`: python scripts/quickstart.py --help"""

import sys

from hf_maskformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
