"""What published scripts answer, for the tests of metrics.

`tests/data/metrics.json` was made with the evaluation scripts that Qwen-VL publishes (ANLS, relaxed accuracy in both
argument orders, VQA score) and with pycocoevalcap (CIDEr-D, on captions that were tokens already), on random texts.
"""

import json
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "metrics.json").read_text(encoding="utf-8"))
