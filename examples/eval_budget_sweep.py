"""The paper's budget curves, against the bytes that are stored.

python examples/eval_budget_sweep.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "budget-sweep", *sys.argv[1:]])
