"""Train a backbone: `deepspeed launch/train.py --recipe care_cifar10 --nodes 1 --optimiser.lr 1e-3`, or torchrun, or python."""

import os
import sys
from typing import Any

from trainer.config import load_run
from trainer.errors import UserError, exit_with_one_line


def train(recipe: str = "demo", nodes: int | None = None, dry_run: bool = False, local_rank: int = 0, **settings: Any) -> None:
    """Train a recipe, continuing it where its folder holds checkpoints.

    Exit codes: 0 done; 75 told to stop by SIGTERM, SIGUSR1 or Ctrl-C and saved, the same command continues; 76 a loss
    was not finite; 74 a checkpoint could not be written; 2 bad input; 1 anything else.

    Args:
        recipe: name of a recipe in trainer/recipes, or path of a YAML file.
        nodes: number of machines promised; a world of another size ends at once.
        dry_run: print what would be run and what it would cost, and touch nothing.
        local_rank: passed by the deepspeed launcher; the environment says the same.
        **settings: any setting by its dotted key, such as --data.batch_size 512 or --objective.weight 10.
    """
    del local_rank
    if nodes is not None and (isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1):
        raise UserError(f"--nodes is {nodes!r}", "a whole number from 1", "Correct it.")
    run = load_run(str(recipe), settings)
    if dry_run:
        from trainer.plan import print_plan

        print_plan(run, nodes)
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"{run.recipe}: loading", flush=True)  # the imports take seconds
    from trainer.loop import train as run_to_end

    if code := run_to_end(run, nodes):
        sys.exit(code)


if __name__ == "__main__":
    exit_with_one_line(train)
