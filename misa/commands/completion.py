"""Print shell code that completes misa's commands, options and rows.

Append it to a file that your shell reads at its start:

    misa completion bash >> ~/.bashrc
    misa completion zsh >> ~/.zshrc
    misa completion fish > ~/.config/fish/completions/misa.fish

example: misa completion bash
"""

from typing import Literal

from misa.parameters import Parameters, argument


class Completion(Parameters):
    """Options of `misa completion`."""

    shell: Literal["bash", "zsh", "fish"] = argument("bash, zsh or fish")


def run(options: Completion) -> int:
    """Print the shell code that argcomplete generates."""
    import argcomplete

    print(argcomplete.shellcode(["misa"], shell=options.shell))
    return 0
