"""Training methods, each a loop short enough to read aloud, and what they share: preparation, saving, proof."""
