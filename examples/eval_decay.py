"""The paper's table of the decay rate lambda, here of caches that lost something.

python examples/eval_decay.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "decay", *sys.argv[1:]])
