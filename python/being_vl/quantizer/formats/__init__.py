"""Published VQ models behind the `Quantizer` protocol: a module per family.

`load_quantizer` asks each module of this package in the order of their names, so a new family is one new file with two
functions:

- `recognizes(files: WeightFiles) -> bool`: whether this is its format, as told by names of tensors or the config.
- `load(files: WeightFiles, device: str) -> Quantizer`: the quantizer at its own size.
"""
