"""Starting a training on one machine or many."""
