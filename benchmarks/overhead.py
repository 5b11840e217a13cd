"""What recording costs; the same as `resdiag bench overhead`.

python benchmarks/overhead.py --variant original --depth 110 --batch-size 128 --threads 2
"""

import sys

from resdiag.cli.main import app

if __name__ == "__main__":
    app(["bench", "overhead", *sys.argv[1:]])
