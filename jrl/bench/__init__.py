"""``jrl bench``: how fast the parts and the whole are here, and how near to what this device can do.

``measure`` times compiled loops, ``work`` counts what they have to compute, ``calibrate`` measures what the
device does at best, ``report`` shows all three, ``command`` puts them together.
"""
