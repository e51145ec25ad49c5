"""All tables and figures. --reduced: a grid for a CPU.

python examples/eval_paper.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "paper", *sys.argv[1:]])
