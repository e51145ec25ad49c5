"""The paper's table of uniform precision against tiers.

python examples/eval_uniform.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "uniform", *sys.argv[1:]])
