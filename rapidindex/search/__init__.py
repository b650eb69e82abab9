"""Search among stored rows, by an exact scan or through FAISS. Knows vectors only.

products      inner products of queries with stored rows
exact         the scan of all rows, and the result of a search
faiss_index   FAISS's index of folded rows
calibration   how many candidates a search needs, and its recall
metadata      `ann.json`: how an index was built, and its recall
spread        a scan that the nodes of a Ray cluster share
vector_index  build, update, open and search a level's index
check         reads every byte of an index, and repairs it
"""
