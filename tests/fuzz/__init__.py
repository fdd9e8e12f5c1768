"""One end of a channel against a peer that mutates what it says, through a real socket.

``peer`` speaks both dialects, rightly or nearly so, with descriptors of many kinds; ``case`` runs one
script against a ``Channel`` and judges it; ``python -m tests.fuzz CASES SEED`` is the long form;
``corpus/`` holds scripts that once found something.
"""
