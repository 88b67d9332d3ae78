"""One vocabulary for text and images: its layout, expanding a language model by it, and asking the model."""
