"""Prompts -> token ids: WordPiece, CLIP's BPE, normalisation, truncation."""
