"""Staged training with DeepSpeed: recipes of stages, the engine, checkpoints and logs."""
