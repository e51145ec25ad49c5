"""The paper's main table (perplexity change by policy and budget) under its own protocol.

python examples/eval_paper_perplexity.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "paper-perplexity", *sys.argv[1:]])
