"""Which extra of the package brings a missing module."""

EXTRAS = {
    "data": ("diffusers", "PIL", "pyarrow", "xxhash"),
    "infer": ("accelerate", "huggingface_hub", "safetensors", "tokenizers", "torch", "transformers"),
    "train": ("deepspeed", "matplotlib", "psutil", "tensorboard"),
    "lora": ("peft",),
    "gguf": ("gguf",),
    "liger": ("liger_kernel",),
    "wandb": ("wandb",),
    "ray": ("ray",),
}
"""Extra → the modules that it brings, and those before it do not."""


def missing_extra(module: str) -> str:
    """What to tell a user about a module that is not installed."""
    name = module.partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    if extra is None:
        return f"needs the package {name}, which is not installed"
    return f"needs the package {name}: from a clone, pip install '.[{extra}]'"
