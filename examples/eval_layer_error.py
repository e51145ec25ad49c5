"""The paper's table and figures of quantisation error by layer.

python examples/eval_layer_error.py --model MODEL --text-file wikitext-2/test.txt --output results/MODEL
"""

import sys

from spectrumkv_hf.commands.main import main

if __name__ == "__main__":
    main(["eval", "layer-error", *sys.argv[1:]])
