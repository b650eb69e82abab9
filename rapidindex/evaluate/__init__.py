"""Is an attribution true? What its rows do to the answer, beside what other rows do.

steps      one optimizer step on some examples, measured and taken back
controls   the rows that are put to the test, and those beside them
retrain    the whole training again, without some of its rows
verify     both, for one question to an index
"""
