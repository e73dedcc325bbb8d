"""`python -m finetune`, `torchrun -m finetune`, `accelerate launch -m finetune`."""

import sys

from finetune.cli import main

sys.exit(main())
