"""Extras of the package: which one brings a module that is missing."""

EXTRA_OF_MODULE = {
    "accelerate": "gguf",
    "gguf": "gguf",
    "liger_kernel": "liger",
    "peft": "lora",
    "ray": "ray",
    "wandb": "wandb",
}
"""Modules that only one use needs → its extra. Others come with the extra of the command that needs them."""


def install_hint(module: str, extra: str = "train") -> str:
    """What to tell a user about a module that is not installed.

    Args:
        module: The module; its first part counts.
        extra: The extra of the command, or of the work, that needs it.
    """
    name = module.partition(".")[0]
    extra = EXTRA_OF_MODULE.get(name, extra)
    return f"needs the package {name}, which is not installed; from a clone: pip install '.[{extra}]'"
