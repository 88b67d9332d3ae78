"""The networks that turn images into ids and back."""
