"""`finetune run PROGRAM ARGS ...`"""

import argparse
import sys

SUMMARY = "run another program (transformers, trl, lm_eval) with Qwen-VL registered"
WHEN_STOPPED = "what the program has written stays"
EXAMPLES = """\
finetune run transformers serve models/docvqa --port 8000
finetune run transformers chat models/docvqa http://localhost:8000/v1
finetune run trl sft --model_name_or_path Qwen/Qwen-VL-Chat --dataset_name data/ --output_dir runs/trl
finetune run lm_eval run --model hf-multimodal --model_args pretrained=models/docvqa --tasks mmmu_val \\
    --apply_chat_template"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "program", metavar="PROGRAM", help="command of an installed package; what follows are its own arguments"
    )


def run(arguments: argparse.Namespace) -> None:
    """Ends by SystemExit, with the program's exit code."""
    from finetune.programs.console_script import call, find_console_script

    program, given = arguments.program, arguments.passed_on
    script = find_console_script(program)
    from finetune.programs.class_names import expose_class_names

    expose_class_names()
    if program == "transformers" and given[:1] == ["serve"]:
        from finetune.programs.transformers_serve import prepare_serve

        prepare_serve()
    elif program == "trl":
        from finetune.programs.trl_launch import prepare_trl

        prepare_trl()
    elif program in ("lm_eval", "lm-eval"):
        from finetune.programs.lm_eval_prompts import prepare_lm_eval

        prepare_lm_eval()
    sys.exit(call(script, program, given))
