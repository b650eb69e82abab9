"""Training data, from rows to token ids. Knows no models.

files        the rows of a file, folder or object
layouts      the columns of a row as a conversation
examples     rows as examples, each with a prompt, a response and an id
templates    examples as token ids, and which of these are the response
bm25         Okapi BM25, the baseline of every ranking
tokens       the tokens that get rows of their own, and those that a query is about
"""
