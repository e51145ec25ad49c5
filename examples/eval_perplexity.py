"""What the paper's main table asks, measured fairly: all methods on the same continuation tokens.

python examples/eval_perplexity.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "perplexity", *sys.argv[1:]])
