"""The paper's ablation of sinks: SinkProtect against Greedy, and other numbers of exact first tokens.

python examples/eval_sinks.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "sinks", *sys.argv[1:]])
