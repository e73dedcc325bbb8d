"""`python -m finetune.programs.registered SCRIPT ARGS`: a Python script, with the model family registered.

Programs that start their own processes (`trl`, through `accelerate launch`) start this in them.
"""

import runpy
import sys

from finetune.programs.class_names import expose_class_names
from finetune.training.processes import keep_closed_groups


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m finetune.programs.registered SCRIPT [ARGS ...]")
    expose_class_names()
    keep_closed_groups()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
