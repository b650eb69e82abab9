"""Influcoder: a small encoder that ranks texts as their gradients do, after arXiv 2606.13668.

embed     a distilled encoder: texts become embeddings, and how the rows of its index were made
parts     the split of an index's examples, and the exact targets
head      the targets' leading coordinates, and the ridge regression that finds them from an encoder's hidden states
training  the paper's way: blocks of anchors and candidates, the loss, and sentence-transformers' trainer with it
distill   options, the output folder, the figures on the held-out part
"""
