"""The paper's table of longer contexts.

python examples/eval_context_length.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "context-length", *sys.argv[1:]])
