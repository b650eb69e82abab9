"""Influcoder: a small encoder that ranks texts as their gradients do (Influcoder, arXiv 2606.13668).

embed     a distilled encoder: texts become embeddings of unit length, and how the rows of its index were made
blocks    the split of an index's examples, the exact targets, and the blocks of anchors and candidates
training  the loss, and sentence-transformers' trainer with it
distill   options, the output folder, resuming, the figures on the held-out part
"""
