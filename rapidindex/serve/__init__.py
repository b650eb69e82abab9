"""A local web page over one index: ask, click a word, see the training examples behind it.

guard    who may talk to the server: token, Host, Origin, sizes and rates; the headers of every response
desk     what the page asks, answered from an index as streams of plain data without paths of this machine
app      the routes, and the server
static/  the page: one HTML file, one stylesheet, ES modules; training text enters it as text alone
"""
