"""`python -m stages NAME ...`: a stage as dvc.yaml calls it, with params.yaml of this folder."""

import sys

from drawplate.core.errors import UserError
from stages import STAGES
from stages.quiet import begin, guarded


def main() -> None:
    """Settles first what cannot wait until a stage's libraries are loaded, which takes seconds."""
    begin()
    name, *arguments = sys.argv[1:] or [""]
    if name not in STAGES:
        raise UserError(f"no stage {name!r}; there are: {', '.join(STAGES)}")
    from stages.run import command_of

    if "--params" not in arguments and "--help" not in arguments:
        arguments = ["--params", "params.yaml", *arguments]
    command_of(name).main(arguments, prog_name=f"python -m stages {name}", standalone_mode=False)


if __name__ == "__main__":
    sys.exit(guarded(main))
