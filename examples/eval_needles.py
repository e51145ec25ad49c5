"""The paper's retrieval table and heat map: needles by depth and budget.

python examples/eval_needles.py --model MODEL --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "needles", *sys.argv[1:]])
