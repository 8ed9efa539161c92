"""Packed shards: data tokenised once, then read by memory map. `build` writes them, `reader` reads them."""
