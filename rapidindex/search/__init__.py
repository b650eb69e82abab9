"""Search among stored rows, exhaustively or through FAISS. Knows vectors only."""
