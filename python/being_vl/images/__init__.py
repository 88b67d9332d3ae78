"""Finding images in folders, lists, tars and tables, and decoding them."""
