"""The retrieval stage: a question becomes ranked training examples and heat-maps.

questions   what a caller may ask, and files of questions
encode      a question as the model reads it, and its RapidGrad
influence   heat-maps and uncompressed influence of what a search found
holders     the rows that hold the words asked about, candidates beside those
evaluation  precision and average precision of rankings, beside BM25
events      the steps of an answer, which every view shares
index       open an index, ask it, say what it holds
two_stages  an index of embeddings: an encoder finds, gradients order
checkpoints  an index of several checkpoints: each of them, and their sum
anchors     questions as anchors of a distillation
specialize  an index whose rows and queries a task's curvature has changed
"""
