"""The viewer: results in a browser on this machine, beside the H&E they were computed from.

It knows the client's results and imaging, nothing of training, export and serving.
"""
