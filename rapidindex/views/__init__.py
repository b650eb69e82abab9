"""Results as people see them. Imports the results alone.

sanitize    training text made harmless to show
heatmap     a text's segments with their shares, and their colours
wording     numbers and findings in words
terminal    results on a terminal: tables, cards and a histogram
trials      a verification in words and on a terminal
tables      the outcomes of commands as titled tables of names and values
html/       results as a page in one file, and as a fragment for notebooks
"""
