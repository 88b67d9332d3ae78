"""Recipes: YAML files of options, among them those that come with the package."""
