"""The paper's ablation of importance: attention, norms, position, recency and chance.

python examples/eval_ranking.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "ranking", *sys.argv[1:]])
