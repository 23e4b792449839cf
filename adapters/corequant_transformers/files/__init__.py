"""Files that appear whole or not at all, and digests of what is in them."""
