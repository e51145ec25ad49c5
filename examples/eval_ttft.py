"""The paper's table of the time to first token, by stage.

python examples/eval_ttft.py --model MODEL --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "ttft", *sys.argv[1:]])
