"""Other packages that compute per-example gradients, each run on the same token ids in an environment of its own.

`environment.py` installs them, `measuring.py` is shared by their scripts, and each script runs one of them. The scripts
import nothing of rapidindex: they read the model, the adapter and the token ids from files.
"""
