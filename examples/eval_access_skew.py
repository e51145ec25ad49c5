"""The paper's motivation: how unequally attention falls on tokens.

python examples/eval_access_skew.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "access-skew", *sys.argv[1:]])
